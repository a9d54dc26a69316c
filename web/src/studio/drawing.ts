// The life of one uPlot: lines put into it, smoothed, and what the pointer stands on told.

import uPlot from "uplot";
import { number } from "../i18n";
import type { ChartView, Line } from "./chart";
import { clockTick, figure, stepTick, ticks } from "./numbers";
import type { Column } from "./records";
import { smooth } from "./smoothing";

export type Tell = (values: string[], place: string) => void;

/** It lasts until the number of lines, the theme or the scale changes. */
export class Drawing {
  hidden: ReadonlySet<string> = new Set();
  /** Where stages begin, on the x axis. */
  marks: () => [number, string][] = () => [];
  private plot: uPlot;
  private lines: Line[] = [];
  /** For each line: the series that shows it smoothed (or alone), and the faint one below. */
  private main: number[] = [];
  private raw: number[] = [];
  private resize: ResizeObserver;

  constructor(
    readonly shape: string,
    box: HTMLElement,
    private view: ChartView,
    lines: Line[],
    private tell: Tell,
  ) {
    const colour = paletteOf(box);
    const series: uPlot.Series[] = [{}];
    // Every step, faintly below the smoothed curve; where there are many it would be a thicket.
    const faint = view.smoothing > 0 && lines.filter((line) => !line.dots).length <= MOST_FAINT;
    for (const line of lines) {
      const stroke = colour(`--st-line-${line.colour % 8}`);
      const smoothed = view.smoothing > 0 && !line.dots;
      if (smoothed && faint) {
        this.raw.push(series.length);
        series.push({ stroke, alpha: 0.28, width: 1, points: { show: false } });
      } else this.raw.push(-1);
      this.main.push(series.length);
      series.push({
        stroke,
        width: line.dots ? 1 : smoothed ? 2 : 1.5,
        dash: line.dashed ? [6, 4] : undefined,
        points: line.dots ? { show: true, size: 6, fill: stroke, stroke } : undefined,
      });
    }
    const size = { width: box.clientWidth, height: box.clientHeight };
    this.plot = new uPlot(this.options(size, series, colour), [[], ...series.slice(1).map(() => [])] as uPlot.AlignedData, box);
    this.resize = new ResizeObserver(() => {
      if (box.clientWidth) this.plot.setSize({ width: box.clientWidth, height: box.clientHeight });
    });
    this.resize.observe(box);
  }

  private options(size: { width: number; height: number }, series: uPlot.Series[], colour: (name: string) => string): uPlot.Options {
    const { view } = this;
    const axis: uPlot.Axis = {
      stroke: colour("--st-axis"),
      font: `11px ${colour("--st-font")}`,
      grid: { stroke: colour("--st-grid"), width: 1 },
      ticks: { show: false },
    };
    const seconds = view.axis === "seconds";
    return {
      ...size,
      padding: [8, 10, 0, 0],
      series,
      legend: { show: false },
      scales: {
        x: { time: false, range: (_, low, high) => view.zoom.value ?? around(low, high) },
        y: view.log
          ? { distr: 3, range: (_, low, high) => (low > 0 ? [low / 1.06, high * 1.06] : [0.1, 1]) }
          : { range: (_, low, high) => padded(low, high) },
      },
      axes: [
        { ...axis, size: 26, gap: 4, space: 64, incrs: seconds ? CLOCK : WHOLE, values: (_, splits) => splits.map((split) => (seconds ? clockTick(split) : stepTick(split))) },
        {
          ...axis,
          ...(view.log ? { splits: (_u, _axis, low, high) => logSplits(low, high), filter: (_u, splits) => splits } : {}),
          size: (_, labels) => 14 + 6.6 * Math.max(2, ...(labels ?? []).map((label) => (label ?? "").length)),
          gap: 4,
          space: 34,
          values: (_, splits) => ticks(splits),
        },
      ],
      cursor: {
        y: false,
        points: { size: (_, i) => (this.raw.includes(i) ? 0 : 7) },
        drag: { x: true, y: false, setScale: false },
        sync: { key: view.together, setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      },
      hooks: {
        setCursor: [() => this.say()],
        setSelect: [(u) => this.chosen(u)],
        draw: [(u) => this.drawMarks(u, colour)],
      },
    };
  }

  put(lines: Line[], strength: number): void {
    this.lines = lines;
    const positive = (ys: Column) => (this.view.log ? ys.map((y) => (y !== null && y > 0 ? y : null)) : ys);
    const tables = lines.map((line, i) => {
      const table: (number[] | Column)[] = [line.xs];
      if (this.raw[i]! > 0) table.push(positive(line.ys));
      table.push(positive(line.dots ? line.ys : smooth(line.ys, strength)));
      return table as uPlot.AlignedData;
    });
    lines.forEach((line, i) => {
      const show = !this.hidden.has(line.label);
      for (const at of [this.main[i]!, this.raw[i]!])
        if (at > 0 && this.plot.series[at]!.show !== show) this.plot.setSeries(at, { show });
    });
    this.plot.setData(tables.length === 1 ? tables[0]! : uPlot.join(tables), true);
    this.say();
  }

  zoomTo(): void {
    this.plot.setData(this.plot.data, true);
  }

  private chosen(u: uPlot): void {
    if (u.select.width < 6) return;
    const [from, to] = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x")];
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.view.zoom.value = [from, to];
  }

  /** Tells the values at the pointer; without one, the latest. */
  say(): void {
    const { idx } = this.plot.cursor;
    const xs = this.plot.data[0];
    const at = idx ?? xs.length - 1;
    const told = this.lines.map((_, i) => figure(near(this.plot.data[this.main[i]!] as Column, at)));
    const x = xs[at];
    this.tell(told, idx == null || x == null ? "" : this.view.axis === "seconds" ? clockTick(x) : number(x));
  }

  private drawMarks(u: uPlot, colour: (name: string) => string): void {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--st-axis");
    ctx.font = `${10 * devicePixelRatio}px ${colour("--st-font")}`;
    ctx.setLineDash([2, 3]);
    ctx.textAlign = "left";
    const wide = bbox.width > 500 * devicePixelRatio;
    this.marks().forEach(([x, name], i) => {
      const left = u.valToPos(x, "x", true);
      if (left < bbox.left - 1 || left > bbox.left + bbox.width) return;
      if (i > 0) {
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        ctx.stroke();
      }
      if (wide) ctx.fillText(name, left + 4 * devicePixelRatio, bbox.top + 10 * devicePixelRatio);
    });
    ctx.restore();
  }

  destroy(): void {
    this.resize.disconnect();
    this.plot.destroy();
  }
}

const MOST_FAINT = 3;
const CLOCK = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 43200, 86400, 172800, 432000];

/** Steps and tokens are whole. */
const WHOLE = Array.from({ length: 13 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();

/** Colours and the font as the theme has them now: a canvas knows no variables. */
function paletteOf(box: HTMLElement): (name: string) => string {
  const style = getComputedStyle(box);
  return (name) => (name === "--st-font" ? style.fontFamily : style.getPropertyValue(name).trim());
}

/** The nearest value at or before a place: a validation is not at every step. */
function near(values: Column, at: number): number | null {
  for (let i = at; i >= 0; i--) if (values[i] != null) return values[i]!;
  return null;
}

/** One point alone needs some room around it. */
function around(low: number | null, high: number | null): [number, number] {
  if (low == null || high == null) return [0, 1];
  return low === high ? [Math.max(0, low - 1), high + 1] : [low, high + (high - low) * 0.01];
}

/** Round numbers on a logarithmic axis; within a factor of a few they are even steps. */
function logSplits(low: number, high: number): number[] {
  const splits: number[] = [];
  if (high / low < 6) {
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find((digit) => digit * power >= rough)! * power;
    for (let i = Math.ceil(low / step); i * step <= high; i++) splits.push(Number((i * step).toPrecision(12)));
    return splits;
  }
  const digits = high / low > 300 ? [1] : [1, 2, 5];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of digits) {
      const split = Number((digit * 10 ** power).toPrecision(12));
      if (split >= low && split <= high) splits.push(split);
    }
  }
  return splits;
}

function padded(low: number | null, high: number | null): [number, number] {
  if (low == null || high == null) return [0, 1];
  if (low === 0 && high === 0) return [0, 1];
  // What hardly changes is to look so, and not be blown up to rounding errors.
  const least = Math.max(Math.abs(low), Math.abs(high)) * 0.02;
  if (high - low < least) return [(low + high - least) / 2, (low + high + least) / 2];
  const room = (high - low) * 0.06;
  // Down to zero when it is near anyway: most measures begin there.
  return [low >= 0 && low - room < (high - low) * 0.25 ? 0 : low - room, high + room];
}
