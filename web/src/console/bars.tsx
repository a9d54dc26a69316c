// Bars by day, stacked: each part is drawn over the sum of those below it.

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";
import { dark } from "../shell/theme";
import { tick } from "../studio/numbers";

export interface Part {
  label: string;
  /** Which of the palette's eight colours. */
  colour: number;
  /** One for each day. */
  values: number[];
}

interface Props {
  title: string;
  days: string[];
  parts: Part[];
  /** How a value is said in the legend. */
  told: (value: number) => string;
  dayTold: (day: string) => string;
}

export function Bars({ title, days, parts, told, dayTold }: Props) {
  const box = useRef<HTMLDivElement>(null);
  const values = useRef<(HTMLElement | null)[]>([]);
  const place = useRef<HTMLSpanElement>(null);
  const isDark = dark.value;
  useEffect(() => {
    const here = box.current!;
    const style = getComputedStyle(here);
    const colour = (name: string) => style.getPropertyValue(name).trim();
    const say = (index: number | null | undefined) => {
      parts.forEach((part, i) => {
        const value = index == null ? part.values.reduce((sum, one) => sum + one, 0) : part.values[index]!;
        if (values.current[i]) values.current[i]!.textContent = told(value);
      });
      if (place.current) place.current.textContent = index == null ? "" : dayTold(days[index]!);
    };
    // The whole stack first, then what is below it, over it.
    const sums = stacked(parts.map((part) => part.values)).reverse();
    const order = parts.map((_, i) => parts.length - 1 - i);
    const axis: uPlot.Axis = { stroke: colour("--st-axis"), font: `11px ${style.fontFamily}`, ticks: { show: false } };
    const plot = new uPlot(
      {
        width: here.clientWidth,
        height: here.clientHeight,
        padding: [8, 10, 0, 0],
        legend: { show: false },
        scales: { x: { time: false, range: () => [-0.6, days.length - 0.4] }, y: { range: (_, __, high) => [0, high > 0 ? high * 1.06 : 1] } },
        series: [
          {},
          ...order.map((i) => ({
            fill: colour(`--st-line-${parts[i]!.colour % 8}`),
            width: 0,
            points: { show: false },
            paths: uPlot.paths.bars!({ size: [0.72, 48] }),
          })),
        ],
        axes: [
          { ...axis, size: 26, gap: 4, space: 52, grid: { show: false }, incrs: [1, 2, 7, 14, 28], values: (_, splits) => splits.map((at) => (days[at] ? dayTold(days[at]!) : "")) },
          {
            ...axis,
            gap: 4,
            grid: { stroke: colour("--st-grid"), width: 1 },
            size: (_, labels) => 14 + 6.6 * Math.max(2, ...(labels ?? []).map((label) => label.length)),
            values: (_, splits) => splits.map((split) => tick(split)),
          },
        ],
        cursor: { y: false, drag: { x: false, y: false }, points: { show: false } },
        hooks: { setCursor: [(u) => say(u.cursor.idx)] },
      },
      [days.map((_, i) => i), ...sums] as uPlot.AlignedData,
      here,
    );
    say(null);
    const resize = new ResizeObserver(() => here.clientWidth && plot.setSize({ width: here.clientWidth, height: here.clientHeight }));
    resize.observe(here);
    return () => {
      resize.disconnect();
      plot.destroy();
    };
  }, [days, parts, isDark]);
  return (
    <figure class="st-chart st-lead" aria-label={title}>
      <figcaption>
        <span class="st-chart-title">{title}</span>
        <span class="st-chart-at" ref={place} />
      </figcaption>
      <div class="st-legend">
        {parts.map((part, i) => (
          <span class="st-key" key={part.label}>
            <i class="st-dot" style={{ background: `var(--st-line-${part.colour % 8})` }} />
            <span>{part.label}</span>
            <b ref={(node) => void (values.current[i] = node)} />
          </span>
        ))}
      </div>
      <div class="st-plot" ref={box} role="img" aria-label={title} />
    </figure>
  );
}

/** [[1, 2], [3, 4]] → [[1, 2], [4, 6]] */
function stacked(rows: number[][]): number[][] {
  let below: number[] | null = null;
  return rows.map((row) => {
    const sums: number[] = row.map((value, i) => value + (below?.[i] ?? 0));
    below = sums;
    return sums;
  });
}
