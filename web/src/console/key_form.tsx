// The form of a key: whose it is, and what it may do.

import { useState } from "preact/hooks";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { patch, post } from "../shell/api";
import { me, models } from "../shell/server";
import { Dialog, Trouble } from "../shell/ui";
import type { Key } from "./keys";

interface FormProps {
  old: Key | null;
  first: boolean;
  accounts: string[];
  onClose: () => void;
  /** With the secret of a new key. */
  onDone: (secret?: string) => void;
}

export function KeyForm({ old, first, accounts, onClose, onDone }: FormProps) {
  const [name, setName] = useState(old?.name ?? "");
  const [account, setAccount] = useState("");
  const [chosen, setChosen] = useState<ReadonlySet<string>>(new Set(old?.models ?? []));
  const [limits, setLimits] = useState({
    rpm: String(old?.rpm ?? ""),
    tpm: String(old?.tpm ?? ""),
    concurrency: String(old?.concurrency ?? ""),
    budget: old?.budget ?? "",
  });
  const [admin, setAdmin] = useState(old?.admin ?? first);
  const [fault, setFault] = useState<unknown>(null);
  const served = [...new Set([...(models.value ?? []).map((model) => model.id), ...(old?.models ?? [])])];

  const save = async (event: Event) => {
    event.preventDefault();
    setFault(null);
    const whole = (text: string) => (text.trim() ? Number(text) : null);
    const body = {
      name: name.trim(),
      models: chosen.size ? [...chosen] : null,
      rpm: whole(limits.rpm),
      tpm: whole(limits.tpm),
      concurrency: whole(limits.concurrency),
      budget: limits.budget.trim() || null,
      admin,
    };
    try {
      if (old) {
        await patch(`api/console/keys/${encodeURIComponent(old.id)}`, body);
        onDone();
      } else {
        const made = await post<Key & { secret: string }>("api/console/keys", { ...body, ...(account.trim() ? { account: account.trim() } : {}) });
        onDone(made.secret);
      }
    } catch (reason) {
      setFault(reason);
    }
  };
  const choose = (id: string) => {
    const now = new Set(chosen);
    if (!now.delete(id)) now.add(id);
    setChosen(now);
  };
  const limit = (field: keyof typeof limits, label: string, decimal = false) => (
    <label class="field">
      <span>{label}</span>
      <input
        class="input"
        inputMode={decimal ? "decimal" : "numeric"}
        pattern={decimal ? "[0-9]+([.][0-9]+)?" : "[1-9][0-9]*"}
        placeholder={t("noLimit")}
        value={limits[field]}
        onInput={(event) => setLimits({ ...limits, [field]: event.currentTarget.value })}
      />
    </label>
  );
  return (
    <Dialog title={old ? t("changeKey", { name: old.name }) : t("makeKey")} onClose={onClose}>
      <form class="stack" onSubmit={save}>
        {first && !old && <p class="co-note">{t("firstKey")}</p>}
        <label class="field">
          <span>{t("keyName")}</span>
          <input class="input" required maxLength={80} placeholder={t("keyNameHint")} value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </label>
        {!old && (
          <>
            <label class="field">
              <span>{t("account")}</span>
              <input class="input" list="co-accounts" placeholder={t("accountHint")} value={account} onInput={(event) => setAccount(event.currentTarget.value)} />
            </label>
            <datalist id="co-accounts">
              {accounts.map((one) => (
                <option key={one} value={one} />
              ))}
            </datalist>
          </>
        )}
        <div class="co-pair">
          {limit("rpm", t("rpm"))}
          {limit("tpm", t("tpm"))}
          {limit("concurrency", t("concurrency"))}
          {limit("budget", t("budget", { currency: me.value?.currency ?? "" }), true)}
        </div>
        {served.length > 0 && (
          <fieldset class="co-choices">
            <legend>{t("theseModels")}</legend>
            {served.map((id) => (
              <label key={id}>
                <input type="checkbox" checked={chosen.has(id)} onChange={() => choose(id)} />
                {id}
              </label>
            ))}
          </fieldset>
        )}
        <label class="co-check">
          <input type="checkbox" checked={admin} disabled={first && !old} onChange={(event) => setAdmin(event.currentTarget.checked)} />
          {t("adminKey")}
        </label>
        {fault !== null && <Trouble fault={fault} />}
        <div class="row end">
          <button type="button" class="button" onClick={onClose}>
            {shellWords("cancel")}
          </button>
          <button type="submit" class="button primary" disabled={!name.trim()}>
            {old ? t("save") : t("make")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
