// The engines, second by second: what runs, what waits, how fast, and how well the cache and the
// drafts do.

import { signal } from "@preact/signals";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { number, short } from "../i18n";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { events, post, remove } from "../shell/api";
import { Icon } from "../shell/icons";
import { refresh } from "../shell/server";
import { Dialog, IconButton, Spinner, tell, tellFault, Trouble } from "../shell/ui";
import { Chart, type ChartView, type Line, type Zoom } from "../studio/chart";
import { figure } from "../studio/numbers";

interface Engine {
  id: string;
  source: string;
  state: "serving" | "loading" | "failed";
  error: string | null;
  /** While it is loaded: how many of how many tensors. */
  done?: number;
  total?: number;
  running?: number;
  waiting?: number;
  cache_tokens_used?: number;
  cache_tokens?: number;
  capacity?: number;
  tokens_per_second?: number | null;
  computed_per_second?: number | null;
  prompt_tokens?: number;
  cached_tokens?: number;
  written_tokens?: number;
  preempted?: number;
  drafting?: string | null;
  acceptance?: number | null;
}

/** What was seen of one engine in the last minutes: one column for each of MEASURES. */
type Past = { at: number[]; rows: (number | null)[][] };
const MEASURES = ["tokens_per_second", "computed_per_second", "running", "waiting"] as const;
const MOST_SECONDS = 180;

export function Engines() {
  const [engines, setEngines] = useState<Engine[] | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  const [loading, setLoading] = useState(false);
  const past = useRef(new Map<string, Past>());
  const looks = useRef(0);

  useEffect(() => {
    const over = new AbortController();
    const follow = async () => {
      while (!over.signal.aborted) {
        try {
          for await (const { event, data } of events("api/console/engine/live", { signal: over.signal })) {
            if (event !== "engine") continue;
            const seen = JSON.parse(data) as Engine[];
            looks.current++;
            for (const engine of seen) remember(past.current, engine);
            setEngines(seen);
            setFault(null);
          }
        } catch (reason) {
          if (over.signal.aborted) return;
          setFault(reason);
        }
        await new Promise((go) => setTimeout(go, 2000));
      }
    };
    void follow();
    return () => over.abort();
  }, []);

  if (engines === null) return fault === null ? <Spinner /> : <Trouble fault={fault} />;
  return (
    <>
      <div class="row end">
        {fault !== null && <span class="soft small-text" role="status">{t("lostEngine")}</span>}
        <button type="button" class="button" onClick={() => setLoading(true)}>
          <Icon name="plus" size={16} />
          {t("loadModel")}
        </button>
      </div>
      {engines.length === 0 && (
        <div class="st-empty">
          <Icon name="gauge" size={40} />
          <h2>{t("noEngine")}</h2>
          <p>{t("noEngineText")}</p>
        </div>
      )}
      {engines.map((engine) => (
        <EngineCard key={engine.id} engine={engine} past={past.current.get(engine.id)} look={looks.current} />
      ))}
      {loading && <LoadModel onClose={() => setLoading(false)} />}
    </>
  );
}

function remember(past: Map<string, Past>, engine: Engine): void {
  const one = past.get(engine.id) ?? { at: [], rows: MEASURES.map(() => []) };
  past.set(engine.id, one);
  one.at.push(performance.now() / 1000);
  MEASURES.forEach((name, i) => one.rows[i]!.push(engine[name] ?? null));
  while (one.at.at(-1)! - one.at[0]! > MOST_SECONDS) {
    one.at.shift();
    for (const row of one.rows) row.shift();
  }
}

const TONES = { serving: "ok", loading: "accent", failed: "danger" };

function EngineCard({ engine, past, look }: { engine: Engine; past?: Past; look: number }) {
  const [asked, setAsked] = useState(false);
  const unload = async () => {
    setAsked(false);
    try {
      await remove(`api/models/${encodeURIComponent(engine.id)}`);
      await refresh();
    } catch (fault) {
      tellFault(fault);
    }
  };
  return (
    <section class="card co-engine" aria-label={engine.id}>
      <header>
        <h2>{engine.id}</h2>
        <span class={`badge ${TONES[engine.state]}`}>{t(`state_${engine.state}`)}</span>
        {engine.capacity !== undefined && <span class="badge">{t("context", { n: number(engine.capacity) })}</span>}
        {engine.drafting && <span class="badge">{t("drafting", { kind: engine.drafting })}</span>}
        <IconButton icon="trash" label={t("unload")} class="co-last" onClick={() => setAsked(true)} />
      </header>
      <p class="faint small-text mono co-source">{engine.source}</p>
      {engine.error && <Trouble fault={engine.error} />}
      {engine.state === "loading" && <Share value={engine.total ? (engine.done ?? 0) / engine.total : 0} label={t("state_loading")} />}
      {engine.state === "serving" && <Figures engine={engine} />}
      {engine.state === "serving" && past && <PastCharts id={engine.id} past={past} look={look} />}
      {asked && (
        <Dialog title={t("unload")} onClose={() => setAsked(false)}>
          <div class="stack">
            <p>{t("unloadAsk", { name: engine.id })}</p>
            <div class="row end">
              <button type="button" class="button" onClick={() => setAsked(false)}>
                {shellWords("cancel")}
              </button>
              <button type="button" class="button danger" onClick={unload}>
                {t("unload")}
              </button>
            </div>
          </div>
        </Dialog>
      )}
    </section>
  );
}

function Share({ value, label }: { value: number; label: string }) {
  const percent = Math.round(Math.min(1, Math.max(0, value)) * 1000) / 10;
  return (
    <span class="co-share" role="progressbar" aria-label={label} aria-valuenow={percent} aria-valuemin={0} aria-valuemax={100}>
      <i style={{ width: `${percent}%` }} />
    </span>
  );
}

function Figures({ engine }: { engine: Engine }) {
  const { cache_tokens_used: used = 0, cache_tokens: all = 0, prompt_tokens: prompt = 0, cached_tokens: cached = 0 } = engine;
  const percent = (share: number | null | undefined) => (share == null ? "–" : `${figure(share * 100)} %`);
  return (
    <dl class="st-figures">
      <div>
        <dt>{t("running")}</dt>
        <dd>{engine.running}</dd>
      </div>
      <div>
        <dt>{t("waiting")}</dt>
        <dd>{engine.waiting}</dd>
      </div>
      <div>
        <dt>{t("speed")}</dt>
        <dd>{engine.tokens_per_second == null ? "–" : number(engine.tokens_per_second)}</dd>
      </div>
      <div>
        <dt>{t("written")}</dt>
        <dd>{short(engine.written_tokens ?? 0)}</dd>
      </div>
      <div>
        <dt>{t("prompts")}</dt>
        <dd>{short(prompt)}</dd>
      </div>
      <div>
        <dt>{t("hits")}</dt>
        <dd>{percent(prompt ? cached / prompt : null)}</dd>
      </div>
      <div>
        <dt>{t("acceptance")}</dt>
        <dd>{percent(engine.acceptance)}</dd>
      </div>
      <div class="co-cache">
        <dt>{t("cache")}</dt>
        <dd>
          <Share value={all ? used / all : 0} label={t("cache")} />
          <small>{t("cacheOf", { used: number(used), all: number(all) })}</small>
        </dd>
      </div>
    </dl>
  );
}

function PastCharts({ id, past, look }: { id: string; past: Past; look: number }) {
  const view: ChartView = useMemo(
    () => ({ axis: "seconds", log: false, smoothing: 0, zoom: signal<Zoom>(null), together: `engine ${id}` }),
    [id],
  );
  const lines = (from: number, names: string[]) => (): Line[] => {
    const now = past.at.at(-1) ?? 0;
    const xs = past.at.map((at) => at - now);
    return names.map((label, i) => ({ label, colour: i, xs, ys: past.rows[from + i]! }));
  };
  const common = { version: look, view, notANumber: () => "" };
  return (
    <div class="st-charts">
      <Chart title={t("chart_speed")} unit="/s" {...common} lines={lines(0, [t("line_written"), t("line_computed")])} />
      <Chart title={t("chart_queue")} {...common} lines={lines(2, [t("line_running"), t("line_waiting")])} />
    </div>
  );
}

function LoadModel({ onClose }: { onClose: () => void }) {
  const [source, setSource] = useState("");
  const [name, setName] = useState("");
  const [fault, setFault] = useState<unknown>(null);
  const load = async (event: Event) => {
    event.preventDefault();
    setFault(null);
    try {
      const { id } = await post<{ id: string }>("api/models/load", { source: source.trim(), ...(name.trim() ? { name: name.trim() } : {}) });
      tell(t("loadBegun", { name: id }));
      onClose();
    } catch (reason) {
      setFault(reason);
    }
  };
  return (
    <Dialog title={t("loadModel")} onClose={onClose}>
      <form class="stack" onSubmit={load}>
        <label class="field">
          <span>{t("loadSource")}</span>
          <input class="input mono" required placeholder="HuggingFaceTB/SmolLM2-135M-Instruct" value={source} onInput={(event) => setSource(event.currentTarget.value)} />
        </label>
        <label class="field">
          <span>{t("loadName")}</span>
          <input class="input mono" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </label>
        {fault !== null && <Trouble fault={fault} />}
        <div class="row end">
          <button type="submit" class="button primary" disabled={!source.trim()}>
            {t("load")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}
