// All curves of one run, or of several over each other, with what is common to them: the scale, the
// smoothing, the x axis and the part that is looked at.

import { signal, type Signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useMemo } from "preact/hooks";
import { studioWord, studioWords as t } from "../i18n/studio";
import { number } from "../i18n";
import { kept } from "../shell/kept";
import { Chart, type ChartView, type Line, type Zoom } from "./chart";
import { GROUPS, panelsOf, plainName, type Curve, type Group, type Panel } from "./fields";
import { Segments } from "./parts";
import type { Column, RunRecords, XAxis } from "./records";

const AXES: XAxis[] = ["step", "tokens", "seconds"];
const RANGES = { all: 0, half: 0.5, tenth: 0.9 } as const;
type Range = keyof typeof RANGES;

const axis = kept<XAxis>("qiusuo.studio.axis", "step");
const log = kept("qiusuo.studio.log", false);
const smoothing = kept("qiusuo.studio.smoothing", 0.4);

export interface Drawn {
  name: string;
  records: RunRecords;
}

interface Props {
  runs: Drawn[];
  version: number;
  /** Names the charts that share a pointer. */
  together: string;
  /** Stands beside the first group on a wide screen, after it on a narrow one. */
  aside?: ComponentChildren;
}

export function Curves({ runs, version, together, aside }: Props) {
  const zoom = useMemo(() => signal<Zoom>(null), []);
  const range = useMemo(() => signal<Range>("all"), []);
  useEffect(() => {
    range.value = "all";
    zoom.value = null;
  }, [axis.value]);
  useEffect(() => {
    if (range.value !== "all") zoom.value = partOf(runs, RANGES[range.value]);
  }, [version, range.value]);

  const view: ChartView = { axis: axis.value, log: log.value, smoothing: smoothing.value, zoom, together };
  const panels = runs.length === 1 ? panelsOfRun(runs[0]!.records) : panelsAcross(runs);
  const [first, ...rest] = groupsOf(panels);
  const chart = (panel: Panel) => <PanelChart key={panel.id} panel={panel} runs={runs} version={version} view={view} />;
  const section = (group: Group) => {
    const own = panels.filter((panel) => panel.group === group);
    const lead = group === first ? own.shift() : undefined;
    return (
      <section key={group} class="st-group" aria-label={t(`group_${group}`)}>
        <h2>{t(`group_${group}`)}</h2>
        {lead && <div class="st-lead">{chart(lead)}</div>}
        {own.length > 0 && <div class="st-charts">{own.map(chart)}</div>}
      </section>
    );
  };
  return (
    <>
      <Toolbar zoom={zoom} range={range} />
      <div class={aside ? "st-curves with-aside" : "st-curves"}>
        {first && section(first)}
        {aside && <aside class="st-aside">{aside}</aside>}
        {rest.map(section)}
      </div>
    </>
  );
}

/** Where there is a reward it is what one looks for; the loss of such a step says little. */
function groupsOf(panels: Panel[]): Group[] {
  const there = GROUPS.filter((group) => panels.some((panel) => panel.group === group));
  return there.includes("reward") ? [...there.filter((group) => group !== "learning"), "learning"] : there;
}

function Toolbar({ zoom, range }: { zoom: Signal<Zoom>; range: Signal<Range> }) {
  return (
    <div class="st-tools" role="toolbar" aria-label={t("tab_curves")}>
      <Segments
        label={t("xAxis")}
        values={AXES}
        chosen={axis.value}
        name={(value) => t(`axis_${value}`)}
        choose={(value) => (axis.value = value)}
      />
      <Segments
        label={t("scale")}
        values={["linear", "log"] as const}
        chosen={log.value ? "log" : "linear"}
        name={(value) => t(value)}
        choose={(value) => (log.value = value === "log")}
      />
      <label class="st-tool">
        <span>{t("smoothing")}</span>
        <input
          type="range"
          min="0"
          max="1"
          step="0.05"
          value={smoothing.value}
          onInput={(event) => (smoothing.value = Number(event.currentTarget.value))}
        />
      </label>
      <label class="st-tool" title={t("zoomHint")}>
        <span>{t("range")}</span>
        <select
          value={zoom.value && range.value === "all" ? "own" : range.value}
          onChange={(event) => {
            range.value = event.currentTarget.value as Range;
            if (range.value === "all") zoom.value = null;
          }}
        >
          {(Object.keys(RANGES) as Range[]).map((name) => (
            <option key={name} value={name}>
              {t(`range_${name}`)}
            </option>
          ))}
          {zoom.value && range.value === "all" && <option value="own">{t("range_own")}</option>}
        </select>
      </label>
      {zoom.value && (
        <button
          type="button"
          class="button small"
          onClick={() => {
            range.value = "all";
            zoom.value = null;
          }}
        >
          {t("zoomOut")}
        </button>
      )}
    </div>
  );
}

function PanelChart({ panel, runs, version, view }: { panel: Panel; runs: Drawn[]; version: number; view: ChartView }) {
  const title = titleOf(panel);
  const alone = runs.length === 1;
  return (
    <Chart
      title={title}
      unit={panel.unit && studioWord(`unit_${panel.unit}`)}
      hint={panel.hint && studioWord(panel.hint)}
      version={version}
      view={view}
      lines={() =>
        alone
          ? linesOf(runs[0]!.records, panel, view.axis, title)
          : runs.map((run, i) => lineOf(run.records, panel, panel.curves[0]!, view.axis, run.name, i))
      }
      marks={alone ? () => stagesOf(runs[0]!.records, view.axis) : undefined}
      notANumber={(count) => t("notANumber", { n: number(count) })}
    />
  );
}

function panelsOfRun(records: RunRecords): Panel[] {
  return panelsOf(records.scalarKeys(), records.listKeys());
}

/** For several runs every curve is a chart of its own, with a line for each run. */
function panelsAcross(runs: Drawn[]): Panel[] {
  const scalars = new Set(runs.flatMap((run) => run.records.scalarKeys()));
  const lists = new Map(runs.flatMap((run) => [...run.records.listKeys()]).map(([key]) => [key, 1]));
  return panelsOf(scalars, lists).flatMap((panel) =>
    panel.curves.map((curve) => ({ ...panel, id: `${panel.id}/${curve.source}/${curve.field}`, curves: [curve] })),
  );
}

function titleOf(panel: Panel): string {
  const known = panel.measure ? t("heldOut", { measure: measureName(panel.measure) }) : panel.title && studioWord(`chart_${panel.title}`);
  if (!known) return plainName(panel.curves[0]!.field);
  // A part of a larger panel, on its own when runs are compared.
  if (panel.id.includes("/")) {
    const part = panel.curves[0]!.index === undefined ? labelOf(panel.curves[0]!, known) : t("worstLayer");
    return part === known ? known : `${known}: ${part}`;
  }
  return known;
}

function measureName(measure: string): string {
  return studioWord(`measure_${measure}`) ?? plainName(measure);
}

function labelOf(curve: Curve, title: string): string {
  if (curve.task !== undefined) return curve.task;
  if (curve.index !== undefined) return t("layer", { n: curve.index + 1 });
  if (curve.label === undefined) return curve.field === title ? title : plainName(curve.field);
  return studioWord(`field_${curve.label}`) ?? title;
}

/** The layers one by one while they can be told apart; the worst and the mean of many. */
const MOST_LAYERS = 6;

function linesOf(records: RunRecords, panel: Panel, x: XAxis, title: string): Line[] {
  const [first] = panel.curves;
  if (first!.index !== undefined && panel.curves.length > MOST_LAYERS) {
    return (["max", "mean"] as const).map((which, colour) => {
      const [xs, ys] = records.across(first!.source, first!.field, x, which);
      return { label: t(which === "max" ? "worstLayer" : "meanLayer"), colour, xs, ys };
    });
  }
  return panel.curves.map((curve, i) => lineOf(records, panel, curve, x, labelOf(curve, title), i));
}

function lineOf(records: RunRecords, panel: Panel, curve: Curve, x: XAxis, label: string, colour: number): Line {
  const across = panel.id.includes("/") && curve.index !== undefined;
  const [xs, ys] = across ? records.across(curve.source, curve.field, x, "max") : records.curve(curve.source, curve.field, x, curve.index);
  const scaled: Column = panel.factor === 1 ? ys : ys.map((y) => (y === null ? null : y * panel.factor));
  const dots = curve.source === "validation";
  return { label, colour, xs, ys: scaled, dots, dashed: !dots && curve.label?.includes("mtp") };
}

function stagesOf(records: RunRecords, x: XAxis): [number, string][] {
  if (records.stages.length < 2) return [];
  return records.stages.map(([step, name]) => [records.placeOf(step, x) ?? 0, name]);
}

/** The last part of what all runs cover, on the x axis. */
function partOf(runs: Drawn[], from: number): Zoom {
  let [low, high] = [Infinity, -Infinity];
  for (const { records } of runs) {
    for (const x of records.xs("step", axis.value)) {
      if (x === null) continue;
      low = Math.min(low, x);
      high = Math.max(high, x);
    }
  }
  return low < high ? [low + (high - low) * from, high] : null;
}
