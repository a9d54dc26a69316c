import { useState } from "preact/hooks";
import { shellWords as t } from "../i18n/shell";
import { giveKey, key, keyWanted } from "./api";
import { refresh } from "./server";
import { Dialog } from "./ui";

export function KeyPrompt() {
  const [text, setText] = useState("");
  const wrong = key() !== "";
  const give = async (event: Event) => {
    event.preventDefault();
    if (!text.trim()) return;
    giveKey(text.trim());
    await refresh();
  };
  return (
    <Dialog title={t("keyTitle")} onClose={() => (keyWanted.value = false)}>
      <form class="stack" onSubmit={give}>
        <p>{t("keyText")}</p>
        <input
          class="input mono"
          type="password"
          autocomplete="off"
          spellcheck={false}
          placeholder="sk-…"
          aria-label={t("keyTitle")}
          autofocus
          value={text}
          onInput={(event) => setText(event.currentTarget.value)}
        />
        {wrong && (
          <p class="bad" role="alert">
            {t("keyWrong")}
          </p>
        )}
        <p class="soft small-text">{t("keyMake")}</p>
        <div class="row end">
          <button type="submit" class="button primary" disabled={!text.trim()}>
            {t("keyGive")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
