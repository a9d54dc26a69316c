// API keys: made, changed, revoked. A key's secret is seen once, by whoever made it.

import { useRef, useState } from "preact/hooks";
import { moment, number } from "../i18n";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { giveKey, remove } from "../shell/api";
import { Icon } from "../shell/icons";
import { me, refresh } from "../shell/server";
import { Dialog, Spinner, tellFault, Trouble } from "../shell/ui";
import { exactly } from "../studio/numbers";
import { useAsked } from "./asked";
import { KeyForm } from "./key_form";
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
