// What the model writes after the same openings, and what happened.

import { number } from "../i18n";
import { studioWords as t } from "../i18n/studio";
import { IconButton } from "../shell/ui";
import type { Happening, Sample } from "./records";

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
