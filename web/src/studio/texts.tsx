// What the model writes: samples after the same openings, and rollouts with what they were worth.

import { useState } from "preact/hooks";
import { number } from "../i18n";
import { studioWords as t } from "../i18n/studio";
import { IconButton } from "../shell/ui";
import { tick } from "./numbers";
import { Segments } from "./parts";
import type { Happening, Rollout, Sample } from "./records";

/** Newest first, those of one step together. */
export function Samples({ samples, most, onTry }: { samples: Sample[]; most?: number; onTry?: (prompt: string) => void }) {
  const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => b - a);
  const shown = most === undefined ? steps : steps.slice(0, most);
  if (!samples.length) return <p class="st-hint">{t("noSamples")}</p>;
  return (
    <>
      {shown.map((step) => (
        <section key={step} class="st-sample-step">
          <h3>{t("atStep", { step: number(step) })}</h3>
          {samples
            .filter((sample) => sample.step === step)
            .map((sample, i) => (
              <div class="st-sample" key={i}>
                <p class="st-text">
                  <span class="st-given">{sample.prompt}</span>
                  {sample.continuation}
                </p>
                {onTry && <IconButton icon="chat" size={16} label={t("talk")} onClick={() => onTry(sample.prompt)} />}
              </div>
            ))}
        </section>
      ))}
    </>
  );
}

const WORTHS = ["all", "right", "wrong"] as const;
type Worth = (typeof WORTHS)[number];
const MOST_ROLLOUTS = 60;

export function Rollouts({ rollouts }: { rollouts: Rollout[] }) {
  const [worth, setWorth] = useState<Worth>("all");
  const chosen = rollouts.filter(
    ({ reward = 0 }) => worth === "all" || (worth === "right") === reward > 0,
  );
  const names = { all: t("allRewards"), right: t("onlyRight"), wrong: t("onlyWrong") };
  return (
    <section class="st-rollouts">
      <div class="st-heat-head">
        <p class="st-hint">{t("rolloutsHint")}</p>
        <Segments label={t("rollouts")} values={WORTHS} chosen={worth} name={(one) => names[one]} choose={setWorth} hidden />
      </div>
      {chosen
        .slice(-MOST_ROLLOUTS)
        .reverse()
        .map((rollout, i) => (
          <OneRollout key={`${rollout.step}/${chosen.length - i}`} rollout={rollout} />
        ))}
    </section>
  );
}

function OneRollout({ rollout }: { rollout: Rollout }) {
  const { step, prompt, answer, thought, reward } = rollout;
  return (
    <article class="card st-rollout">
      <header>
        <span class="faint">{t("atStep", { step: number(step) })}</span>
        {reward !== undefined && (
          <span class={reward > 0 ? "badge ok" : "badge danger"}>{t("reward", { value: tick(reward) })}</span>
        )}
      </header>
      <p class="st-text st-given">{prompt}</p>
      {thought && (
        <details class="st-thought">
          <summary>{t("thought")}</summary>
          <p class="st-text">{thought}</p>
        </details>
      )}
      <p class="st-text">{answer}</p>
    </article>
  );
}

export function Events({ events }: { events: Happening[] }) {
  if (!events.length) return null;
  return (
    <section>
      <h2>{t("events")}</h2>
      <ol class="st-events">
        {[...events].reverse().map((event, i) => (
          <li key={events.length - i}>
            {event.step !== undefined && <span class="faint numbers">{t("atStep", { step: number(event.step) })}</span>}
            <span>{event.text}</span>
          </li>
        ))}
      </ol>
    </section>
  );
}
