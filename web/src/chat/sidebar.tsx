import { useEffect, useRef, useState } from "preact/hooks";
import { shellWords } from "../i18n/shell";
import { Icon } from "../shell/icons";
import { address, go, place } from "../shell/router";
import { Dialog, IconButton, Menu, Spinner, Trouble } from "../shell/ui";
import { drop, exported, list, listFault, load, more, search, searched } from "./conversations";
import { forgetThread, renameThread, writingIn } from "./thread";
import type { Summary } from "./types";
import { chatWords as t } from "./words";

type Age = "today" | "yesterday" | "week" | "older";

function ageOf(seconds: number): Age {
  const midnight = new Date();
  midnight.setHours(0, 0, 0, 0);
  const days = (midnight.getTime() - seconds * 1000) / 86_400_000;
  if (days <= 0) return "today";
  if (days <= 1) return "yesterday";
  return days <= 6 ? "week" : "older";
}

export function Sidebar({ open, onClose }: { open: boolean; onClose: () => void }) {
  const [doomed, setDoomed] = useState<Summary | null>(null);
  useEffect(() => void load(), []);
  const groups = new Map<Age, Summary[]>();
  for (const one of list.value ?? []) {
    const age = ageOf(one.updated);
    groups.set(age, [...(groups.get(age) ?? []), one]);
  }
  return (
    <>
      {open && <div class="side-veil" onClick={onClose} />}
      <aside class={"side" + (open ? " open" : "")} aria-label={t("conversations")}>
        <div class="side-head">
          <a
            class="button new-chat"
            href={address("chat")}
            onClick={onClose}
          >
            <Icon name="plus" size={16} />
            {t("newChat")}
          </a>
          <IconButton class="side-close" icon="close" label={shellWords("close")} onClick={onClose} />
        </div>
        <label class="search">
          <Icon name="search" size={16} />
          <input
            id="search"
            type="search"
            placeholder={t("search")}
            aria-label={t("searchLabel")}
            value={searched.value}
            onInput={(event) => search(event.currentTarget.value)}
            onKeyDown={(event) => {
              if (event.key === "Escape" && searched.value) {
                event.stopPropagation();
                search("");
              }
              if (event.key === "ArrowDown")
                document.querySelector<HTMLElement>(".side .conversation a")?.focus();
            }}
          />
          <kbd aria-hidden="true">{navigator.platform.startsWith("Mac") ? "⌘K" : "Ctrl K"}</kbd>
        </label>
        <nav class="side-list" aria-label={t("conversations")}>
          {listFault.value !== null && <Trouble fault={listFault.value} onRetry={() => void load()} />}
          {list.value === null && listFault.value === null && <Spinner />}
          {list.value?.length === 0 && (
            <p class="faint small-text side-empty">
              {searched.value ? t("nothingFound") : t("noConversations")}
            </p>
          )}
          {[...groups].map(([age, some]) => (
            <section key={age}>
              <h3>{t(age)}</h3>
              <ul>
                {some.map((one) => (
                  <Row key={one.id} one={one} onOpen={onClose} onDelete={() => setDoomed(one)} />
                ))}
              </ul>
            </section>
          ))}
          {more.value && (
            <button type="button" class="button quiet small" onClick={() => void load(list.value!.at(-1))}>
              {t("earlier")}
            </button>
          )}
        </nav>
      </aside>
      {doomed && <Deleting one={doomed} onClose={() => setDoomed(null)} />}
    </>
  );
}

function Row({ one, onOpen, onDelete }: { one: Summary; onOpen: () => void; onDelete: () => void }) {
  const [naming, setNaming] = useState(false);
  const title = one.title || t("untitled");
  const here = place.value.area === "chat" && place.value.id === one.id;
  if (naming) return <Naming one={one} onEnd={() => setNaming(false)} />;
  return (
    <li class={"conversation" + (here ? " here" : "")}>
      <a href={address("chat", one.id)} aria-current={here ? "page" : undefined} title={title} onClick={onOpen}>
        <span class="title">{title}</span>
        {searched.value && one.snippet && <span class="snippet">{one.snippet}</span>}
        {writingIn(one.id) && <span class="pulse" role="img" aria-label={t("writing")} />}
      </a>
      <Menu
        label={t("actionsOf", { name: title })}
        choices={[
          { label: t("rename"), icon: "edit", run: () => setNaming(true) },
          { label: t("exportMd"), icon: "download", run: () => exported(one, "md") },
          { label: t("exportJson"), icon: "download", run: () => exported(one, "json") },
          { label: t("delete"), icon: "trash", danger: true, run: onDelete },
        ]}
      />
    </li>
  );
}

function Naming({ one, onEnd }: { one: Summary; onEnd: () => void }) {
  const box = useRef<HTMLInputElement>(null);
  const done = useRef(false);
  useEffect(() => box.current!.select(), []);
  const end = (keep: boolean) => {
    if (done.current) return;
    done.current = true;
    const title = box.current!.value.trim();
    if (keep && title && title !== one.title) void renameThread(one.id, title);
    onEnd();
  };
  return (
    <li class="conversation naming">
      <input
        ref={box}
        class="input"
        aria-label={t("rename")}
        defaultValue={one.title}
        maxLength={200}
        onBlur={() => end(true)}
        onKeyDown={(event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            end(false);
          }
          if (event.key === "Enter" && !event.isComposing) end(true);
        }}
      />
    </li>
  );
}

function Deleting({ one, onClose }: { one: Summary; onClose: () => void }) {
  const run = async () => {
    onClose();
    forgetThread(one.id);
    if ((await drop(one.id)) && place.value.area === "chat" && place.value.id === one.id)
      go("chat", null, true);
  };
  return (
    <Dialog title={t("deleteTitle")} onClose={onClose}>
      <div class="stack">
        <p>{t("deleteText", { name: one.title || t("untitled") })}</p>
        <div class="row end">
          <button type="button" class="button" onClick={onClose}>
            {shellWords("cancel")}
          </button>
          <button type="button" class="button danger" onClick={run}>
            {t("delete")}
          </button>
        </div>
      </div>
    </Dialog>
  );
}
