// API keys: made, changed, revoked. A key's secret is seen once, by whoever made it.

import { useRef, useState } from "preact/hooks";
import { moment, number } from "../i18n";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { giveKey, patch, post, remove } from "../shell/api";
import { Icon } from "../shell/icons";
import { me, models, refresh } from "../shell/server";
import { Dialog, Spinner, tellFault, Trouble } from "../shell/ui";
import { exactly } from "../studio/numbers";
import { useAsked } from "./asked";
import { Money, rounded } from "./money";

export interface Key {
  id: string;
  name: string;
  account: string;
  prefix: string;
  models: string[] | null;
  rpm: number | null;
  tpm: number | null;
  concurrency: number | null;
  budget: string | null;
  spent: string;
  reserved: string;
  admin: boolean;
  created: number;
  revoked: number | null;
}

export function KeyList() {
  const { value: keys, fault, again } = useAsked<Key[]>("api/console/keys");
  const [making, setMaking] = useState(false);
  const [changed, setChanged] = useState<Key | null>(null);
  const [doomed, setDoomed] = useState<Key | null>(null);
  const [secret, setSecret] = useState<string | null>(null);
  if (keys === null) return fault === null ? <Spinner /> : <Trouble fault={fault} onRetry={again} />;
  const alive = keys.filter((key) => key.revoked === null);
  const revoked = keys.filter((key) => key.revoked !== null);

  const revoke = async () => {
    try {
      await remove(`api/console/keys/${encodeURIComponent(doomed!.id)}`);
      again();
    } catch (reason) {
      tellFault(reason);
    }
    setDoomed(null);
  };
  /** The first key closes the door behind it: from here on this page needs it as well. */
  const taken = async () => {
    const first = me.value?.open;
    const own = secret!;
    setSecret(null);
    if (first) {
      giveKey(own);
      await refresh();
    } else again();
  };
  return (
    <>
      <div class="row end">
        <button type="button" class="button primary" onClick={() => setMaking(true)}>
          <Icon name="plus" size={16} />
          {t("makeKey")}
        </button>
      </div>
      {alive.length === 0 ? <p class="soft">{t("noKeys")}</p> : <KeyTable keys={alive} onChange={setChanged} onRevoke={setDoomed} />}
      {revoked.length > 0 && (
        <details>
          <summary class="soft small-text">{t("revokedKeys", { n: revoked.length })}</summary>
          <KeyTable keys={revoked} />
        </details>
      )}
      {(making || changed) && (
        <KeyForm
          key={changed?.id ?? "new"}
          old={changed}
          first={me.value?.open ?? false}
          accounts={[...new Set(keys.map((key) => key.account))]}
          onClose={() => {
            setMaking(false);
            setChanged(null);
          }}
          onDone={(made) => {
            setMaking(false);
            setChanged(null);
            if (made) setSecret(made);
            else again();
          }}
        />
      )}
      {secret !== null && <Secret secret={secret} onClose={taken} />}
      {doomed && (
        <Dialog title={t("revoke")} onClose={() => setDoomed(null)}>
          <div class="stack">
            <p>{t("revokeAsk", { name: doomed.name })}</p>
            <div class="row end">
              <button type="button" class="button" onClick={() => setDoomed(null)}>
                {shellWords("cancel")}
              </button>
              <button type="button" class="button danger" onClick={revoke}>
                {t("revoke")}
              </button>
            </div>
          </div>
        </Dialog>
      )}
    </>
  );
}

interface TableProps {
  keys: Key[];
  onChange?: (key: Key) => void;
  onRevoke?: (key: Key) => void;
}

function KeyTable({ keys, onChange, onRevoke }: TableProps) {
  return (
    <div class="co-wide">
      <table class="table co-cards">
        <thead>
          <tr>
            <th scope="col">{t("keyName")}</th>
            <th scope="col">{t("account")}</th>
            <th scope="col">{t("models")}</th>
            <th scope="col">{t("limits")}</th>
            <th scope="col" class="right">
              {t("used")}
            </th>
            <th scope="col">{t("created")}</th>
            {onChange && (
              <th scope="col">
                <span class="unseen">{t("actions")}</span>
              </th>
            )}
          </tr>
        </thead>
        <tbody>
          {keys.map((key) => (
            <tr key={key.id}>
              <th scope="row">
                <b>{key.name}</b> {key.admin && <span class="badge accent">{t("admin")}</span>}
                <div class="mono faint">{key.prefix}</div>
              </th>
              <td data-label={t("account")}>{key.account}</td>
              <td data-label={t("models")}>{key.models?.join(", ") ?? t("allModels")}</td>
              <td data-label={t("limits")}>{limitsOf(key)}</td>
              <td data-label={t("used")} class="right numbers">
                {key.budget === null ? <Money amount={key.spent} /> : t("ofBudget", { spent: rounded(key.spent), budget: rounded(key.budget) })}
              </td>
              <td data-label={t("created")} title={exactly(key.created * 1000)}>
                {moment(key.created * 1000)}
              </td>
              {onChange && (
                <td class="right co-actions">
                  <button type="button" class="button small" onClick={() => onChange(key)}>
                    {t("change")}
                  </button>
                  <button type="button" class="button small danger" onClick={() => onRevoke!(key)}>
                    {t("revoke")}
                  </button>
                </td>
              )}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

function limitsOf(key: Key): string {
  const told = (["rpm", "tpm", "concurrency"] as const)
    .filter((name) => key[name] !== null)
    .map((name) => t(`limit_${name}`, { n: number(key[name]!) }));
  return told.join(" · ") || t("noLimit");
}

interface FormProps {
  old: Key | null;
  first: boolean;
  accounts: string[];
  onClose: () => void;
  /** With the secret of a new key. */
  onDone: (secret?: string) => void;
}

function KeyForm({ old, first, accounts, onClose, onDone }: FormProps) {
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

function Secret({ secret, onClose }: { secret: string; onClose: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    field.current!.select();
    // The clipboard is only there on https and on this machine; elsewhere the old way works.
    if (navigator.clipboard) await navigator.clipboard.writeText(secret).catch(() => document.execCommand("copy"));
    else document.execCommand("copy");
    setCopied(true);
  };
  return (
    <Dialog title={t("secretTitle")} onClose={onClose}>
      <div class="stack">
        <p>{t("secretText")}</p>
        <div class="co-secret">
          <input ref={field} class="input mono" readOnly value={secret} aria-label={t("secretTitle")} onFocus={(event) => event.currentTarget.select()} />
          <button type="button" class="button" onClick={copy}>
            <Icon name={copied ? "check" : "copy"} size={16} />
            {copied ? t("copied") : t("copy")}
          </button>
        </div>
        <div class="row end">
          <button type="button" class="button primary" onClick={onClose}>
            {t("done")}
          </button>
        </div>
      </div>
    </Dialog>
  );
}
