// The frame around the three areas: where one is, the language, the light, and the key.
import type { ComponentType } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { language } from "../i18n";
import { shellWords as t } from "../i18n/shell";
import { keyGiven, keyWanted } from "./api";
import { Icon, Mark, type IconName } from "./icons";
import { KeyPrompt } from "./key";
import { address, place, type Place } from "./router";
import { me, refresh } from "./server";
import { theme, type Theme } from "./theme";
import { IconButton, Spinner, Told, Trouble } from "./ui";

// Each area is a file of its own, fetched when it is first looked at.
const AREAS: Record<Place["area"], () => Promise<ComponentType<{ id: string | null }>>> = {
  chat: async () => {
    const { Chat } = await import("../chat");
    return ({ id }) => <Chat conversation={id} />;
  },
  studio: async () => {
    const { Studio } = await import("../studio");
    return ({ id }) => <Studio run={id} />;
  },
  console: async () => {
    const { Console } = await import("../console");
    return ({ id }) => <Console section={id} />;
  },
};
const loaded: Partial<Record<Place["area"], ComponentType<{ id: string | null }>>> = {};
const NAV: [Place["area"], IconName][] = [
  ["chat", "chat"],
  ["studio", "chart"],
  ["console", "gauge"],
];
const NEXT_THEME: Record<Theme, Theme> = { system: "light", light: "dark", dark: "system" };
const THEME_ICON: Record<Theme, IconName> = { system: "system", light: "sun", dark: "moon" };

function Area({ at }: { at: Place }) {
  const [, draw] = useState(0);
  const [failed, setFailed] = useState(false);
  const load = () => {
    setFailed(false);
    AREAS[at.area]().then(
      (part) => {
        loaded[at.area] = part;
        draw((count) => count + 1);
      },
      () => setFailed(true),
    );
  };
  useEffect(() => {
    if (!loaded[at.area]) load();
  }, [at.area]);
  const Part = loaded[at.area];
  if (Part) return <Part id={at.id} />;
  if (failed) return <Trouble fault={t("partFailed")} onRetry={load} />;
  return (
    <div class="middle">
      <Spinner />
    </div>
  );
}

export function App() {
  useEffect(() => void refresh(), []);
  const at = place.value;
  // From the other areas one comes back to the conversation one left.
  const talk = useRef<string | null>(null);
  if (at.area === "chat") talk.current = at.id;
  const link = (area: Place["area"]) => address(area, area === "chat" && at.area !== "chat" ? talk.current : null);
  useEffect(() => {
    if (at.area !== "chat") document.title = `${t(at.area)} · Qiusuo`;
  }, [at.area, language.value]);
  return (
    <>
      <a class="skip" href="#main" onClick={skipToMain}>
        {t("skip")}
      </a>
      <header class="top">
        <a class="brand" href={address("chat")} aria-label="Qiusuo">
          <Mark size={26} />
          <span>Qiusuo</span>
        </a>
        <nav class="areas" aria-label="Qiusuo">
          {NAV.map(([area, icon]) => (
            <a key={area} href={link(area)} aria-current={at.area === area ? "page" : undefined}>
              <Icon name={icon} size={17} />
              <span>{t(area)}</span>
            </a>
          ))}
        </nav>
        <div class="top-end">
          {me.value?.balance != null && (
            <span class="balance small-text soft">
              {me.value.balance} {me.value.currency}
            </span>
          )}
          <button
            type="button"
            class="icon-button word"
            title={t("languageLabel")}
            aria-label={t("languageLabel")}
            onClick={() => (language.value = language.value === "zh" ? "en" : "zh")}
          >
            {t("language")}
          </button>
          <IconButton
            icon={THEME_ICON[theme.value]}
            label={t(`theme_${theme.value}`)}
            onClick={() => (theme.value = NEXT_THEME[theme.value])}
          />
        </div>
      </header>
      <main id="main" class="area" tabIndex={-1} key={at.area + keyGiven.value}>
        <Area at={at} />
      </main>
      {keyWanted.value && <KeyPrompt key={keyGiven.value} />}
      <Told />
    </>
  );
}

function skipToMain(event: Event): void {
  event.preventDefault(); // the # belongs to the router
  document.getElementById("main")!.focus();
}
