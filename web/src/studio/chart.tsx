// One chart: the drawing, a legend that tells the values under the pointer, zoom shared with its
// neighbours. Data that grows is put into the same canvas, so nothing flickers.

import type { Signal } from "@preact/signals";
import { useEffect, useRef, useState } from "preact/hooks";
import "uplot/dist/uPlot.min.css";
import { dark } from "../shell/theme";
import { Drawing } from "./drawing";
import type { Column, XAxis } from "./records";

export interface Line {
  label: string;
  /** Which of the palette's eight colours. */
  colour: number;
  xs: number[];
  ys: Column;
  /** A few measured points rather than a curve: shown as dots, never smoothed. */
  dots?: boolean;
  dashed?: boolean;
}

export type Zoom = [number, number] | null;

export interface ChartView {
  axis: XAxis;
  log: boolean;
  /** 0 to 1. */
  smoothing: number;
  zoom: Signal<Zoom>;
  /** Charts of one name share their pointer. */
  together: string;
}

interface Props {
  title: string;
  unit?: string;
  hint?: string;
  /** Called when there is something to draw, and only for a chart that is on the screen. */
  lines: () => Line[];
  /** Changes when the lines do. */
  version: unknown;
  view: ChartView;
  /** Where stages begin, on the x axis. */
  marks?: () => [number, string][];
  notANumber: (count: number) => string;
}

export function Chart(props: Props) {
  const { title, unit, hint, version, view } = props;
  const box = useRef<HTMLDivElement>(null);
  const drawn = useRef<Drawing | null>(null);
  const seen = useOnScreen(box);
  const [labels, setLabels] = useState<Line[]>([]);
  const [hidden, setHidden] = useState<ReadonlySet<string>>(new Set());
  const values = useRef<(HTMLElement | null)[]>([]);
  const place = useRef<HTMLSpanElement>(null);
  const broken = useRef<HTMLParagraphElement>(null);

  const isDark = dark.value;
  const zoom = view.zoom.value;

  useEffect(() => {
    if (!seen || !box.current) return;
    const lines = props.lines();
    const shape = JSON.stringify([lines.map((l) => [l.label, l.colour, l.dots, l.dashed]), view.log, view.axis, view.smoothing > 0, isDark]);
    if (drawn.current?.shape !== shape) {
      drawn.current?.destroy();
      drawn.current = new Drawing(shape, box.current, view, lines, (told, at) => {
        told.forEach((text, i) => values.current[i] && (values.current[i]!.textContent = text));
        if (place.current) place.current.textContent = at;
      });
      setLabels(lines);
    }
    drawn.current.hidden = hidden;
    if (props.marks) drawn.current.marks = props.marks; // of the records as they are now
    drawn.current.put(lines, view.smoothing);
    const lost = lines.reduce((sum, line) => sum + line.ys.filter((y) => y === null).length, 0);
    if (broken.current) broken.current.textContent = lost ? props.notANumber(lost) : "";
  }, [seen, version, title, view.log, view.axis, view.smoothing, isDark, hidden]);

  useEffect(() => drawn.current?.say(), [labels]); // now that there are places to say it in
  useEffect(() => drawn.current?.zoomTo(), [zoom]);
  useEffect(() => () => drawn.current?.destroy(), []);

  const toggle = (label: string) => {
    const now = new Set(hidden);
    if (!now.delete(label)) now.add(label);
    setHidden(now);
  };

  return (
    <figure class="st-chart" aria-label={title}>
      <figcaption>
        <span class="st-chart-title" title={hint}>
          {title}
          {unit && <small>{unit}</small>}
        </span>
        <span class="st-chart-at" ref={place} />
      </figcaption>
      <div class="st-legend">
        {labels.map((line, i) => (
          <button
            type="button"
            key={line.label}
            class="st-key"
            aria-pressed={!hidden.has(line.label)}
            disabled={labels.length < 2}
            onClick={() => toggle(line.label)}
          >
            <i class={line.dots ? "st-dot" : "st-dash"} style={{ background: `var(--st-line-${line.colour % 8})` }} />
            {(labels.length > 1 || line.label !== title) && <span>{line.label}</span>}
            <b ref={(node) => void (values.current[i] = node)} />
          </button>
        ))}
      </div>
      <div class="st-plot" ref={box} role="img" aria-label={title} />
      <p class="st-broken" ref={broken} />
    </figure>
  );
}

/** A chart that was never on the screen draws nothing. */
function useOnScreen(box: { current: HTMLElement | null }): boolean {
  const [seen, setSeen] = useState(false);
  useEffect(() => {
    const watch = new IntersectionObserver(([entry]) => setSeen(entry!.isIntersecting), { rootMargin: "300px" });
    watch.observe(box.current!);
    return () => watch.disconnect();
  }, []);
  return seen;
}
