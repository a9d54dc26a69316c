// Console: who may ask, what it costs, what was used, and how the engines do.

import "../studio/parts.css";
import "./console.css";
import { consoleWords as t } from "../i18n/console";
import { go } from "../shell/router";
import { me } from "../shell/server";
import { Spinner } from "../shell/ui";
import { Tabs } from "../studio/parts";
import { Accounts } from "./accounts";
import { Engines } from "./engines";
import { KeyList } from "./keys";
import { Prices } from "./prices";
import { Usage } from "./usage";

const SECTIONS = { engine: Engines, usage: Usage, keys: KeyList, accounts: Accounts, prices: Prices } as const;
type Section = keyof typeof SECTIONS;
/** What a key that is no administrator's may see: its own usage, and the prices. */
const FOR_ALL: Section[] = ["usage", "prices"];

export function Console({ section }: { section: string | null }) {
  const who = me.value;
  const sections = who?.admin ? (Object.keys(SECTIONS) as Section[]) : FOR_ALL;
  const shown = sections.find((name) => name === section) ?? sections[0]!;
  const Shown = SECTIONS[shown];
  return (
    <div class="page st-page co-page">
      <header>
        <h1>{t("title")}</h1>
        <p class="soft">{who && !who.admin ? t("adminOnlyPart") : t("lead")}</p>
      </header>
      <Tabs tabs={sections} shown={shown} name={(one) => t(`section_${one}`)} choose={(one) => go("console", one, true)} />
      <div role="tabpanel" id="st-panel" aria-labelledby={`st-tab-${shown}`} class="co-panel">
        {who ? <Shown /> : <Spinner />}
      </div>
    </div>
  );
}
