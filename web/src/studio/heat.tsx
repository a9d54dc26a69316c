// Which expert had how much to do, over time: one strip of pixels per expert, one map per layer.

import { useEffect, useRef, useState } from "preact/hooks";
import { number } from "../i18n";
import { dark } from "../shell/theme";
import type { Load } from "./records";
import { studioWords as t } from "../i18n/studio";
import { figure } from "./numbers";

type Rgb = [number, number, number];

// Blue and orange differ for every kind of colour blindness; the middle is the page's own ground,
// so that what is even is what is quiet.
const COLOURS: Record<"light" | "dark", { less: Rgb[]; even: Rgb; more: Rgb[]; none: Rgb }> = {
  light: { less: [[139, 180, 222], [24, 76, 140]], even: [246, 246, 244], more: [[246, 178, 107], [166, 64, 0]], none: [200, 200, 200] },
  dark: { less: [[40, 92, 150], [133, 190, 255]], even: [32, 34, 38], more: [[156, 84, 18], [255, 190, 110]], none: [90, 90, 90] },
};

/** -1 for a quarter of the even share or less, 0 for the even share, 1 for four times it. */
export function deviation(load: number): number {
  return Math.max(-1, Math.min(1, Math.log2(Math.max(load, 1e-6)) / 2));
}

export function colourOf(load: number | null, theme: "light" | "dark"): Rgb {
  const { less, even, more, none } = COLOURS[theme];
  if (load === null) return none;
  const far = deviation(load);
  const [near, end] = far < 0 ? less : more;
  const size = Math.abs(far);
  return size < 0.5 ? blend(even, near!, size * 2) : blend(near!, end!, size * 2 - 1);
}

function blend(a: Rgb, b: Rgb, share: number): Rgb {
  return a.map((value, i) => Math.round(value + (b[i]! - value) * share)) as Rgb;
}

const MOST_COLUMNS = 600;
const MOST_LAYERS = 8;

export function ExpertHeat({ loads, version }: { loads: Load[]; version: number }) {
  const layers = Math.max(0, ...loads.slice(-1).map((load) => load.rows.length));
  const [page, setPage] = useState(0);
  const pages = Math.ceil(layers / MOST_LAYERS);
  const shown = Array.from({ length: layers }, (_, i) => i).slice(page * MOST_LAYERS, (page + 1) * MOST_LAYERS);
  return (
    <section class="st-heat" aria-labelledby="st-heat-title">
      <div class="st-heat-head">
        <h3 id="st-heat-title">{t("expertLoad")}</h3>
        <Scale />
        {pages > 1 && (
          <label>
            {t("layers")}{" "}
            <select value={page} onChange={(event) => setPage(Number(event.currentTarget.value))}>
              {Array.from({ length: pages }, (_, i) => (
                <option key={i} value={i}>
                  {i * MOST_LAYERS + 1}–{Math.min(layers, (i + 1) * MOST_LAYERS)}
                </option>
              ))}
            </select>
          </label>
        )}
      </div>
      <p class="st-hint">{t("expertLoadHint")}</p>
      <div class="st-heat-maps">
        {shown.map((layer) => (
          <LayerMap key={layer} layer={layer} loads={loads} version={version} />
        ))}
      </div>
    </section>
  );
}

function Scale() {
  const theme = dark.value ? "dark" : "light";
  return (
    <span class="st-heat-scale" role="img" aria-label={t("scaleLabel")}>
      {[0.25, 0.5, 1, 2, 4].map((load) => (
        <span key={load} style={{ background: `rgb(${colourOf(load, theme)})`, color: inkOn(colourOf(load, theme)) }}>
          {load === 0.25 ? "≤¼" : load === 0.5 ? "½" : load === 4 ? "≥4×" : `${load}`}
        </span>
      ))}
    </span>
  );
}

function inkOn([r, g, b]: Rgb): string {
  return r * 0.3 + g * 0.59 + b * 0.11 > 140 ? "#111" : "#fff";
}

function LayerMap({ layer, loads, version }: { layer: number; loads: Load[]; version: number }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [told, setTold] = useState("");
  const theme = dark.value ? "dark" : "light";
  const columns = thinned(loads);
  const experts = Math.max(0, ...columns.slice(-1).map((load) => load.rows[layer]?.length ?? 0));

  useEffect(() => {
    const { current } = canvas;
    if (!current || !experts) return;
    current.width = columns.length;
    current.height = experts;
    const context = current.getContext("2d")!;
    const image = context.createImageData(columns.length, experts);
    columns.forEach((load, x) => {
      for (let expert = 0; expert < experts; expert++) {
        const [r, g, b] = colourOf(load.rows[layer]?.[expert] ?? null, theme);
        image.data.set([r, g, b, 255], 4 * (expert * columns.length + x));
      }
    });
    context.putImageData(image, 0, 0);
  }, [version, columns.length, experts, theme, layer]);

  const point = (event: PointerEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const x = Math.min(columns.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns.length)));
    const expert = Math.min(experts - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * experts)));
    const load = columns[x]?.rows[layer]?.[expert] ?? null;
    setTold(t("loadAt", { expert: expert + 1, step: number(columns[x]?.step ?? 0), load: figure(load) }));
  };

  const last = loads.at(-1)?.rows[layer] ?? [];
  const worst = last.reduce<number>((most, load, i) => ((load ?? 0) > (last[most] ?? 0) ? i : most), 0);
  const summary = t("loadNow", { expert: worst + 1, load: figure(last[worst] ?? null) });
  return (
    <figure class="st-heat-map">
      <figcaption>
        <b>{t("layer", { n: layer + 1 })}</b> <span>{told || summary}</span>
      </figcaption>
      <div class="st-heat-frame">
        <span class="st-heat-y" aria-hidden="true">
          <i>1</i>
          <i>{experts}</i>
        </span>
        <canvas
          ref={canvas}
          role="img"
          aria-label={`${t("layer", { n: layer + 1 })}: ${summary}`}
          style={{ height: `${Math.max(48, Math.min(220, experts * 14))}px` }}
          onPointerMove={point}
          onPointerDown={point}
          onPointerLeave={() => setTold("")}
        />
      </div>
      <div class="st-heat-x" aria-hidden="true">
        <span>{number(columns[0]?.step ?? 0)}</span>
        <span>{t("axis_step")}</span>
        <span>{number(columns.at(-1)?.step ?? 0)}</span>
      </div>
    </figure>
  );
}

/** More columns than pixels say nothing more. */
function thinned(loads: Load[]): Load[] {
  if (loads.length <= MOST_COLUMNS) return loads;
  return Array.from({ length: MOST_COLUMNS }, (_, i) => loads[Math.round((i * (loads.length - 1)) / (MOST_COLUMNS - 1))]!);
}
