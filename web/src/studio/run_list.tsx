// The runs on this machine: where each stands, at a glance.

import { useEffect, useState } from "preact/hooks";
import { moment, number } from "../i18n";
import { studioWord, studioWords as t } from "../i18n/studio";
import { get } from "../shell/api";
import { Icon } from "../shell/icons";
import { address, go } from "../shell/router";
import { me } from "../shell/server";
import { Spinner, Trouble } from "../shell/ui";
import type { Run } from "./live";
import { exactly, figure, roughly } from "./numbers";
import { StartRun } from "./start";

const LOOK_EVERY = 2000; // milliseconds

export function RunList() {
  const [runs, setRuns] = useState<Run[] | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  const [chosen, setChosen] = useState<ReadonlySet<string>>(new Set());
  const [starting, setStarting] = useState(false);
  const [asked, setAsked] = useState(0);
  useRuns(setRuns, setFault, asked);

  const choose = (id: string) => {
    const now = new Set(chosen);
    if (!now.delete(id)) now.add(id);
    setChosen(now);
  };
  const admin = me.value?.admin;
  return (
    <div class="page st-page">
      <header class="st-head">
        <div>
          <h1>{t("title")}</h1>
          <p class="soft">{t("lead")}</p>
        </div>
        <div class="row">
          {runs && runs.length > 1 && (
            <button
              type="button"
              class="button"
              disabled={chosen.size < 2}
              title={t("compareHint")}
              onClick={() => go("studio", "compare:" + [...chosen].join(","))}
            >
              <Icon name="chart" size={16} />
              {chosen.size < 2 ? t("compare") : t("compareChosen", { n: chosen.size })}
            </button>
          )}
          <button
            type="button"
            class="button primary"
            disabled={!admin}
            title={admin === false ? t("notAdmin") : undefined}
            onClick={() => setStarting(true)}
          >
            <Icon name="plus" size={16} />
            {t("newRun")}
          </button>
        </div>
      </header>
      {fault !== null && <Trouble fault={fault} onRetry={() => setAsked(asked + 1)} />}
      {runs === null && fault === null && (
        <div class="middle">
          <Spinner />
        </div>
      )}
      {runs?.length === 0 && <NoRuns />}
      {!!runs?.length && (
        <ul class="st-runs">
          {runs.map((run) => (
            <RunRow key={run.id} run={run} chosen={chosen.has(run.id)} choose={runs.length > 1 ? () => choose(run.id) : undefined} />
          ))}
        </ul>
      )}
      {starting && <StartRun onClose={() => setStarting(false)} />}
    </div>
  );
}

/** Asks again every two seconds while somebody looks. */
function useRuns(take: (runs: Run[]) => void, fail: (fault: unknown) => void, asked: number): void {
  useEffect(() => {
    const over = new AbortController();
    let timer: ReturnType<typeof setTimeout>;
    const look = async () => {
      try {
        if (!document.hidden) take(await get<Run[]>("api/runs", over.signal));
        fail(null);
      } catch (fault) {
        if (over.signal.aborted) return;
        fail(fault);
      }
      timer = setTimeout(look, LOOK_EVERY);
    };
    void look();
    return () => {
      over.abort();
      clearTimeout(timer);
    };
  }, [asked]);
}

function NoRuns() {
  return (
    <div class="st-empty">
      <Icon name="chart" size={40} />
      <h2>{t("noRuns")}</h2>
      <p>{t("noRunsText")}</p>
      <p class="soft">{t("noRunsAsk")}</p>
      <pre class="mono">qiusuo quickstart</pre>
    </div>
  );
}

function RunRow({ run, chosen, choose }: { run: Run; chosen: boolean; choose?: () => void }) {
  const when = run.started * 1000;
  return (
    <li class="st-run">
      {choose && <input type="checkbox" checked={chosen} onChange={choose} aria-label={t("chooseRun", { name: run.name })} />}
      <a href={address("studio", run.id)}>
        <span class="st-run-name">
          <b>{run.id}</b>
          <small class="faint">
            {run.name !== run.id && run.name} <time title={exactly(when)}>{moment(when)}</time>
          </small>
        </span>
        <StateBadge state={run.state} />
        <span class="st-run-progress">
          <Progress run={run} />
          <small class="faint numbers">{whereabouts(run)}</small>
        </span>
        <span class="st-run-loss numbers">
          <b>{figure(Number(run.reward ?? run.loss ?? NaN))}</b>
          <small class="faint">{run.reward != null ? t("rewardNow") : run.best != null ? t("best", { value: figure(Number(run.best)) }) : t("loss")}</small>
        </span>
      </a>
    </li>
  );
}

export function whereabouts(run: { step: number; steps: number; state: string; eta_seconds: number | null }): string {
  const values = { step: number(run.step), steps: number(run.steps) };
  const at = run.steps ? t("stepOf", values) : t("stepOnly", values);
  const left = run.state === "running" && run.eta_seconds != null ? t("left", { time: roughly(run.eta_seconds) }) : "";
  return left ? `${at} · ${left}` : at;
}

export function Progress({ run }: { run: { progress: number; state: string } }) {
  const share = Math.round(Math.max(0, Math.min(1, run.progress)) * 1000) / 10;
  return (
    <span
      class={`st-progress st-is-${run.state}`}
      role="progressbar"
      aria-label={t("progress")}
      aria-valuenow={share}
      aria-valuemin={0}
      aria-valuemax={100}
    >
      <i style={{ width: `${share}%` }} />
    </span>
  );
}

const TONES: Record<string, string> = { running: "accent", starting: "accent", finished: "ok", failed: "danger", interrupted: "warn", killed: "warn" };

export function StateBadge({ state }: { state: string }) {
  return (
    <span class={`badge st-state ${TONES[state] ?? ""}`} data-state={state}>
      {(state === "running" || state === "starting") && <i class="st-pulse" />}
      {studioWord(`state_${state}`) ?? state}
    </span>
  );
}
