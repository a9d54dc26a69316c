// One run: where it stands, its curves as they grow, what it writes, what it was made from.

import { useEffect, useMemo, useState } from "preact/hooks";
import { duration, short } from "../i18n";
import { studioWords as t, type StudioWord } from "../i18n/studio";
import { Fault, post } from "../shell/api";
import { startChat } from "../shell/handover";
import { Icon } from "../shell/icons";
import { address } from "../shell/router";
import { me, refresh } from "../shell/server";
import { Dialog, Spinner, tell, tellFault, Trouble } from "../shell/ui";
import { shellWords } from "../i18n/shell";
import { Curves } from "./curves";
import { flatten, Facts, RecipeTable, Summary } from "./facts";
import { ExpertHeat } from "./heat";
import { LiveRun, type RunDetail } from "./live";
import type { Source } from "./fields";
import { figure } from "./numbers";
import { Tabs } from "./parts";
import type { RunRecords } from "./records";
import { Report } from "./report";
import { Progress, StateBadge, whereabouts } from "./run_list";
import { Rollouts } from "./rollouts";
import { Events, Samples } from "./texts";

type Tab = "curves" | "experts" | "texts" | "rollouts" | "recipe" | "report";

export function RunPage({ id }: { id: string }) {
  const live = useMemo(() => new LiveRun(id), [id]);
  const [tab, setTab] = useState<Tab>("curves");
  useEffect(() => {
    void live.begin();
    return () => live.end();
  }, [live]);
  useEffect(() => {
    document.title = `${id} · Qiusuo`;
  }, [id]);

  const version = live.version.value;
  const run = live.run.value;
  const fault = live.fault.value;
  if (!run || !live.loaded.value) {
    return (
      <div class="page st-page">
        <Back />
        {fault === null ? <div class="middle"><Spinner /></div> : <Trouble fault={gone(fault, id)} />}
      </div>
    );
  }
  const { records } = live;
  const tabs = tabsOf(run, records);
  const shown = tabs.includes(tab) ? tab : "curves";
  const talk = run.model ? (prompt?: string) => talkTo(run, prompt) : undefined;
  return (
    <div class="page st-page">
      <Back />
      <RunHead run={run} live={live} talk={talk} />
      {fault !== null && <p class="st-reconnecting" role="status">{t("reconnecting")}</p>}
      {run.error && <Trouble fault={run.error} />}
      <KeyFigures records={records} version={version} />
      <Tabs tabs={tabs} shown={shown} name={(one) => t(`tab_${one}`)} choose={setTab} />
      <div role="tabpanel" id="st-panel" aria-labelledby={`st-tab-${shown}`} class="st-panel">
        {shown === "curves" && <CurvesTab live={live} version={version} more={() => setTab("texts")} />}
        {shown === "experts" && <ExpertHeat loads={records.loads} version={version} />}
        {shown === "texts" && (
          <div class="st-reading">
            <p class="st-hint">{t("samplesHint")}</p>
            <Samples samples={records.samples} onTry={talk} />
            <Events events={records.events} />
          </div>
        )}
        {shown === "rollouts" && <Rollouts id={run.id} records={records} version={version} />}
        {shown === "recipe" && <RecipeTab run={run} />}
        {shown === "report" && <Report id={run.id} name={run.name} />}
      </div>
    </div>
  );
}

function tabsOf(run: RunDetail, records: RunRecords): Tab[] {
  const tabs: Tab[] = ["curves"];
  if (records.loads.length) tabs.push("experts");
  if (records.samples.length || records.events.length) tabs.push("texts");
  if (records.tables.rollout.steps.length) tabs.push("rollouts");
  tabs.push("recipe");
  if (run.report) tabs.push("report");
  return tabs;
}

function gone(fault: unknown, id: string): unknown {
  return fault instanceof Fault && fault.status === 404 ? t("runGone", { name: id }) : fault;
}

async function talkTo(run: { id: string }, prompt?: string): Promise<void> {
  try {
    const { id } = await post<{ id: string }>(`api/runs/${encodeURIComponent(run.id)}/serve`);
    await refresh();
    startChat({ model: id, prompt });
  } catch (fault) {
    tellFault(fault);
  }
}

function Back() {
  return (
    <a class="st-back" href={address("studio")}>
      <Icon name="left" size={16} />
      {t("back")}
    </a>
  );
}

function RunHead({ run, live, talk }: { run: RunDetail; live: LiveRun; talk?: () => Promise<void> }) {
  const [stopping, setStopping] = useState(false);
  const [asked, setAsked] = useState(false);
  const [busy, setBusy] = useState(false);
  const going = run.state === "running" || run.state === "starting";
  useEffect(() => {
    if (!going) setAsked(false);
  }, [going]);

  const act = async (what: "stop" | "resume") => {
    setStopping(false);
    setAsked(what === "stop");
    try {
      await post(`api/runs/${encodeURIComponent(run.id)}/${what}`);
      if (what === "resume") tell(t("resumed"));
      await live.refresh();
    } catch (fault) {
      setAsked(false);
      tellFault(fault);
    }
  };
  const resumable = run.state === "interrupted" || run.state === "killed" || run.state === "failed";
  return (
    <header class="st-run-head">
      <div class="st-head">
        <div class="st-run-title">
          <h1>{run.id}</h1>
          <StateBadge state={run.state} />
          {going && live.connected.value && <span class="st-live">{t("live")}</span>}
        </div>
        <div class="row">
          {going && me.value?.admin && (
            <button type="button" class="button" disabled={asked} onClick={() => setStopping(true)}>
              <Icon name="stop" size={16} />
              {asked ? t("stopping") : t("stop")}
            </button>
          )}
          {resumable && me.value?.admin && (
            <button type="button" class="button" onClick={() => act("resume")}>
              <Icon name="play" size={16} />
              {t("resume")}
            </button>
          )}
          {talk && (
            <button
              type="button"
              class="button primary"
              disabled={busy}
              onClick={async () => {
                setBusy(true);
                await talk();
                setBusy(false);
              }}
            >
              <Icon name="chat" size={16} />
              {busy ? t("talkLoading") : t("talk")}
            </button>
          )}
        </div>
      </div>
      <Progress run={run} />
      <p class="soft small-text numbers">
        {whereabouts(run)}
        {run.stage && ` · ${t("stageIs", { stage: run.stage })}`}
      </p>
      {stopping && (
        <Dialog title={t("stop")} onClose={() => setStopping(false)}>
          <div class="stack">
            <p>{t("stopAsk")}</p>
            <div class="row end">
              <button type="button" class="button" onClick={() => setStopping(false)}>
                {shellWords("cancel")}
              </button>
              <button type="button" class="button danger" onClick={() => act("stop")}>
                {t("stop")}
              </button>
            </div>
          </div>
        </Dialog>
      )}
    </header>
  );
}

/** The numbers to read first; a number that the log does not hold is not there. `version` is for
 * drawing anew: the records grow in place. */
function KeyFigures({ records }: { records: RunRecords; version: number }) {
  const seconds = records.tables.step.seconds.at(-1) ?? null;
  const tokens = records.tables.step.tokens.at(-1) ?? null;
  const reward = records.last("reward", "rollout");
  const percent = (value: number | null) => value === null ? null : `${figure(value * 100)} %`;
  const plain = (value: number | null) => (value === null ? null : figure(value));
  const whole = records.last("whole_loss", "validation") !== null;
  const [loss, bits] = whole ? ["whole_loss", "whole_bits_per_character"] : ["loss", "bits_per_character"];
  const of = (field: string, source: Source = "step") => records.stageOf(field, source);
  const all: [StudioWord, string | null, (string | null)?][] = [
    ["figure_reward", plain(reward), of("reward", "rollout")],
    ["figure_pass", percent(records.last("pass_at_1", "rollout")), of("pass_at_1", "rollout")],
    ["figure_length", plain(records.last("length", "rollout")), of("length", "rollout")],
    ["figure_entropy", plain(records.last("entropy", "rollout")), of("entropy", "rollout")],
    ["figure_loss", reward === null ? plain(records.lastSmoothed("loss")) : null, of("loss")],
    [whole ? "figure_whole" : "figure_validation", plain(records.last(loss, "validation")), of(loss, "validation")],
    ["figure_bits", reward === null ? plain(records.last(bits, "validation")) : null, of(bits, "validation")],
    ["figure_speed", plain(records.lastSmoothed("tokens_per_second"))],
    ["figure_tokens", tokens === null ? null : short(tokens)],
    ["figure_time", seconds === null ? null : duration(seconds)],
  ];
  const known = all.filter(([, value]) => value !== null);
  if (!known.length) return null;
  return (
    <dl class="st-figures">
      {known.map(([key, value, stage]) => (
        <div key={key}>
          <dt>
            {t(key)}
            {stage && <small>{stage}</small>}
          </dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

function CurvesTab({ live, version, more }: { live: LiveRun; version: number; more: () => void }) {
  const { records } = live;
  const run = live.run.value!;
  const drawn = useMemo(() => [{ name: live.id, records }], [live, records]);
  if (!records.count) {
    const going = run.state === "running" || run.state === "starting";
    return (
      <div class="st-empty">
        {going ? <Spinner /> : <Icon name="chart" size={40} />}
        <h2>{going ? t("waiting") : t("noNumbers")}</h2>
        {going && <p>{t("waitingText")}</p>}
        {run.console && <pre class="st-printed">{run.console}</pre>}
      </div>
    );
  }
  const aside = records.samples.length > 0 && (
    <>
      <h2>{t("samples")}</h2>
      <Samples samples={records.samples} most={2} />
      <button type="button" class="button small quiet" onClick={more}>
        {t("showAll")}
        <Icon name="right" size={14} />
      </button>
    </>
  );
  return <Curves runs={drawn} version={version} together={`run ${live.id}`} aside={aside || undefined} />;
}

function RecipeTab({ run }: { run: RunDetail }) {
  return (
    <div class="stack">
      {Object.keys(run.summary).length > 0 && (
        <section>
          <h2>{t("summary")}</h2>
          <Summary summary={run.summary} />
        </section>
      )}
      <section>
        <h2>{t("recipe")}</h2>
        <RecipeTable recipe={run.recipe} />
      </section>
      {Object.keys(run.environment).length > 0 && (
        <section>
          <h2>{t("environment")}</h2>
          <Facts rows={flatten(run.environment)} />
        </section>
      )}
      {run.console && (
        <section>
          <h2>{t("printed")}</h2>
          <pre class="st-printed">{run.console}</pre>
        </section>
      )}
    </div>
  );
}
