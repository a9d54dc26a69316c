// Accounts and their money. Every movement carries a token, so that a request sent twice moves once.

import { useMemo, useState } from "preact/hooks";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { post } from "../shell/api";
import { Icon } from "../shell/icons";
import { me, refresh } from "../shell/server";
import { Dialog, Menu, Spinner, tell, tellFault, Trouble } from "../shell/ui";
import { useAsked } from "./asked";
import { Money, rounded } from "./money";

interface Account {
  name: string;
  open: boolean;
  total: string;
  granted: string;
  topped_up: string;
  reserved: string;
}

export function Accounts() {
  const { value: accounts, fault, again } = useAsked<Account[]>("api/console/accounts");
  const [topped, setTopped] = useState<string | null>(null);
  if (accounts === null) return fault === null ? <Spinner /> : <Trouble fault={fault} onRetry={again} />;
  const setOpen = async (account: Account, open: boolean) => {
    try {
      await post("api/console/accounts", { account: account.name, open });
      again();
    } catch (reason) {
      tellFault(reason);
    }
  };
  return (
    <>
      <div class="row end">
        <button type="button" class="button primary" onClick={() => setTopped("")}>
          <Icon name="plus" size={16} />
          {t("topUp")}
        </button>
      </div>
      {accounts.length === 0 ? (
        <p class="soft">{t("noAccounts")}</p>
      ) : (
        <div class="co-wide">
          <table class="table co-cards">
            <thead>
              <tr>
                <th scope="col">{t("account")}</th>
                <th scope="col" class="right">{t("balance")}</th>
                <th scope="col" class="right">{t("paid")}</th>
                <th scope="col" class="right">{t("grantedShort")}</th>
                <th scope="col" class="right">{t("reserved")}</th>
                <th scope="col">
                  <span class="unseen">{t("actions")}</span>
                </th>
              </tr>
            </thead>
            <tbody>
              {accounts.map((account) => (
                <tr key={account.name}>
                  <th scope="row">
                    {account.name}{" "}
                    {account.open && (
                      <span class="badge" title={t("openHint")}>
                        {t("openAccount")}
                      </span>
                    )}
                  </th>
                  <td data-label={t("balance")} class="right">
                    <b class={Number(account.total) < 0 && !account.open ? "bad" : ""}>
                      <Money amount={account.total} currency={me.value?.currency} />
                    </b>
                  </td>
                  <td data-label={t("paid")} class="right"><Money amount={account.topped_up} /></td>
                  <td data-label={t("grantedShort")} class="right"><Money amount={account.granted} /></td>
                  <td data-label={t("reserved")} class="right"><Money amount={account.reserved} /></td>
                  <td class="right co-actions">
                    <button type="button" class="button small" onClick={() => setTopped(account.name)}>
                      {t("topUp")}
                    </button>
                    <Menu
                      label={t("actions")}
                      choices={[{ label: t(account.open ? "makeClosed" : "makeOpen"), run: () => void setOpen(account, !account.open) }]}
                    />
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {topped !== null && (
        <TopUp
          account={topped}
          known={accounts.map((account) => account.name)}
          onClose={() => setTopped(null)}
          onDone={() => {
            setTopped(null);
            again();
            void refresh();
          }}
        />
      )}
    </>
  );
}

function newToken(): string {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

interface TopUpProps {
  account: string;
  known: string[];
  onClose: () => void;
  onDone: () => void;
}

function TopUp({ account, known, onClose, onDone }: TopUpProps) {
  const token = useMemo(newToken, []);
  const [name, setName] = useState(account);
  const [amount, setAmount] = useState("");
  const [granted, setGranted] = useState(false);
  const [note, setNote] = useState("");
  const [busy, setBusy] = useState(false);
  const [fault, setFault] = useState<unknown>(null);
  const currency = me.value?.currency ?? "";
  const move = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setFault(null);
    try {
      const body = { account: name.trim(), amount: amount.trim(), granted, token, ...(note.trim() ? { note: note.trim() } : {}) };
      const now = await post<Account>("api/console/accounts", body);
      tell(t("toppedUp", { name: now.name, total: rounded(now.total), currency }));
      onDone();
    } catch (reason) {
      setFault(reason);
      setBusy(false);
    }
  };
  return (
    <Dialog title={t("topUpTitle")} onClose={onClose}>
      <form class="stack" onSubmit={move}>
        <label class="field">
          <span>{t("account")}</span>
          <input class="input" required list="co-known" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </label>
        <datalist id="co-known">
          {known.map((one) => (
            <option key={one} value={one} />
          ))}
        </datalist>
        <label class="field">
          <span>{t("amount", { currency })}</span>
          <input
            class="input numbers"
            required
            inputMode="decimal"
            pattern="-?[0-9]+([.][0-9]+)?"
            placeholder="10.00"
            title={t("amountHint")}
            value={amount}
            onInput={(event) => setAmount(event.currentTarget.value)}
          />
          <small class="faint">{t("amountHint")}</small>
        </label>
        <label class="field">
          <span>{t("note")}</span>
          <input class="input" maxLength={200} value={note} onInput={(event) => setNote(event.currentTarget.value)} />
        </label>
        <label class="co-check">
          <input type="checkbox" checked={granted} onChange={(event) => setGranted(event.currentTarget.checked)} />
          {t("granted")}
        </label>
        {fault !== null && <Trouble fault={fault} />}
        <div class="row end">
          <button type="button" class="button" onClick={onClose}>
            {shellWords("cancel")}
          </button>
          <button type="submit" class="button primary" disabled={busy || !name.trim() || !amount.trim()}>
            {t("topUp")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
