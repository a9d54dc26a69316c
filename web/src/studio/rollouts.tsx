// What a policy answered on the way to its reward: a page of answers from a chosen step on, read
// from the server as one looks, because there may be far more than a browser should hold.

import { useEffect, useState } from "preact/hooks";
import { number } from "../i18n";
import { studioWord, studioWords as t } from "../i18n/studio";
import { get } from "../shell/api";
import { Spinner, tellFault, Trouble } from "../shell/ui";
import { plainName } from "./fields";
import { tick } from "./numbers";
import { Segments } from "./parts";
import type { RunRecords } from "./records";

interface Rollout {
  step: number;
  task?: string;
  difficulty?: number;
  prompt?: string;
  /** null: the response has no place for one. */
  thought: string | null;
  /** What stands after the thought. */
  text: string;
  right: boolean;
  reward?: number;
  reason?: string;
  tokens?: number;
  advantage?: number;
  measures?: Record<string, unknown>;
}

interface Page {
  rollouts: Rollout[];
  /** Where the next page begins; null: there is none. */
  next: number | null;
  /** The first and the last step of which there are answers. */
  steps: [number, number] | null;
}

const WORTHS = ["all", "right", "wrong"] as const;
type Worth = (typeof WORTHS)[number];
const LONG = 600; // characters of a thought that is shown only when it is asked for

/** `version` is for looking anew: the records grow in place. */
export function Rollouts({ id, records }: { id: string; records: RunRecords; version: number }) {
  const [worth, setWorth] = useState<Worth>("all");
  const [task, setTask] = useState("");
  /** null: the latest, as they come. */
  const [from, setFrom] = useState<number | null>(null);
  const [page, setPage] = useState<Page | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  const tasks = tasksOf(records);
  const address = (more: Record<string, unknown>) => {
    const asked = { worth: worth === "all" ? "" : worth, task, first: from ?? "", ...more };
    const told = Object.entries(asked).filter(([, value]) => value !== "");
    return `api/runs/${encodeURIComponent(id)}/rollouts?${new URLSearchParams(told.map(([key, value]) => [key, String(value)]))}`;
  };
  const latest = from === null ? records.tables.rollout.steps.at(-1) : undefined;

  useEffect(() => {
    const over = new AbortController();
    get<Page>(address({}), over.signal).then(
      (seen) => {
        setPage(seen);
        setFault(null);
      },
      (failed) => !over.signal.aborted && setFault(failed),
    );
    return () => over.abort();
  }, [id, worth, task, from, latest]);

  const more = async () => {
    try {
      const { rollouts, next } = await get<Page>(address({ start: page!.next }));
      setPage({ ...page!, rollouts: [...page!.rollouts, ...rollouts], next });
    } catch (failed) {
      tellFault(failed);
    }
  };
  const names = { all: t("allRewards"), right: t("onlyRight"), wrong: t("onlyWrong") };
  const steps = page?.steps;
  return (
    <section class="st-rollouts">
      <p class="st-hint">{t("rolloutsHint")}</p>
      <div class="st-tools" role="toolbar" aria-label={t("rollouts")}>
        <Segments label={t("rollouts")} values={WORTHS} chosen={worth} name={(one) => names[one]} choose={setWorth} hidden />
        {tasks.length > 1 && (
          <label class="st-tool">
            <span>{t("task")}</span>
            <select value={task} onChange={(event) => setTask(event.currentTarget.value)}>
              <option value="">{t("allTasks")}</option>
              {tasks.map((one) => (
                <option key={one}>{one}</option>
              ))}
            </select>
          </label>
        )}
        {steps && steps[0] < steps[1] && (
          <label class="st-tool st-from">
            <span>{t("fromStep", { step: number(from ?? steps[1]) })}</span>
            <input
              type="range"
              aria-label={t("firstStep")}
              min={steps[0]}
              max={steps[1]}
              value={from ?? steps[1]}
              onInput={(event) => setFrom(Number(event.currentTarget.value) < steps[1] ? Number(event.currentTarget.value) : null)}
            />
          </label>
        )}
      </div>
      {fault !== null && <Trouble fault={fault} />}
      {!page && fault === null && <Spinner />}
      {page && !page.rollouts.length && page.next === null && <p class="st-hint">{page.steps ? t("noSuchRollouts") : t("noRollouts")}</p>}
      {page && stepsOf(page.rollouts).map(([step, own]) => <OneStep key={step} step={step} rollouts={own} />)}
      {page && page.next !== null && (
        <button type="button" class="button small" onClick={more}>
          {t("moreRollouts")}
        </button>
      )}
    </section>
  );
}

/** Those of which a pass rate is logged. */
function tasksOf(records: RunRecords): string[] {
  const fields = [...records.tables.rollout.scalars.keys()].filter((field) => field.startsWith("by_task:"));
  return fields.map((field) => field.slice("by_task:".length)).sort(new Intl.Collator("en", { numeric: true }).compare);
}

function stepsOf(rollouts: Rollout[]): [number, Rollout[]][] {
  const steps = new Map<number, Rollout[]>();
  for (const rollout of rollouts) steps.set(rollout.step, [...(steps.get(rollout.step) ?? []), rollout]);
  return [...steps];
}

function OneStep({ step, rollouts }: { step: number; rollouts: Rollout[] }) {
  return (
    <section class="st-rollout-step">
      <h3>{t("atStep", { step: number(step) })}</h3>
      {rollouts.map((rollout, i) => (
        <OneRollout key={i} rollout={rollout} />
      ))}
    </section>
  );
}

function OneRollout({ rollout }: { rollout: Rollout }) {
  const { prompt, thought, text, right, reward, reason } = rollout;
  return (
    <article class="card st-rollout">
      <header>
        <span class={right ? "badge ok" : "badge danger"}>
          {typeof reward === "number" ? t("reward", { value: tick(reward) }) : right ? t("onlyRight") : t("onlyWrong")}
        </span>
        {reason && <span class="soft">{reason}</span>}
      </header>
      <p class="st-text st-given">{prompt}</p>
      {thought !== null && (
        <details class="st-thought" open={thought.length <= LONG}>
          <summary>{t("thought")}</summary>
          <p class="st-text">{thought.trim() ? thought : <i class="faint">{t("noThought")}</i>}</p>
        </details>
      )}
      <p class="st-text">{text.trim() ? text : <i class="faint">{t("noAnswer")}</i>}</p>
      <p class="st-rollout-facts">{factsOf(rollout).join(" · ")}</p>
    </article>
  );
}

function factsOf({ task, difficulty, tokens, advantage, measures = {} }: Rollout): string[] {
  const facts: string[] = [];
  if (task) facts.push(difficulty === undefined ? task : `${task}/${difficulty}`);
  if (typeof tokens === "number") facts.push(t("rolloutTokens", { n: number(tokens) }));
  if (typeof advantage === "number") facts.push(t("rolloutAdvantage", { value: (advantage > 0 ? "+" : "") + tick(advantage, 3) }));
  for (const [measure, value] of Object.entries(measures)) {
    if (measure === "thought" || typeof value !== "number") continue;
    facts.push(`${(studioWord(`measure_${measure}`) ?? plainName(measure)).toLowerCase()} ${tick(value)}`);
  }
  return facts;
}
