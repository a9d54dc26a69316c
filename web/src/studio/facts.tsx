// A recipe, an environment or a summary: nested values as a table that can be read and searched.

import { number } from "../i18n";

export type Flat = [key: string, value: string][];

/** {stages: [{name: "pretrain", steps: 4}]} → [["stages.pretrain.steps", "4"], …]: the keys of --set. */
export function flatten(value: unknown, under = ""): Flat {
  if (Array.isArray(value) && value.some((item) => typeof item === "object" && item !== null)) {
    return value.flatMap((item, i) => flatten(item, join(under, stageName(item) ?? String(i))));
  }
  if (typeof value === "object" && value !== null && !Array.isArray(value)) {
    return Object.entries(value).flatMap(([key, inner]) => flatten(inner, join(under, key)));
  }
  return [[under, told(value)]];
}

const join = (under: string, key: string) => (under ? `${under}.${key}` : key);

function stageName(item: unknown): string | undefined {
  const { name, kind } = item as { name?: unknown; kind?: unknown };
  return typeof name === "string" ? name : typeof kind === "string" ? kind : undefined;
}

export function told(value: unknown): string {
  if (Array.isArray(value)) return value.map(told).join(" · ");
  if (value === null || value === undefined) return "–";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** A value of a summary: a number with its unit, a list of sources. */
function summed(value: unknown): string {
  if (typeof value === "number") return Number.isInteger(value) ? number(value) : String(value);
  if (Array.isArray(value)) return value.map(summed).join("; ");
  if (typeof value === "object" && value !== null) {
    const { value: amount, unit, name, license } = value as Record<string, unknown>;
    if (amount !== undefined) return `${summed(amount)} ${unit ?? ""}`.trim();
    if (name !== undefined) return license ? `${name} (${license})` : String(name);
    return Object.entries(value).map(([key, inner]) => `${key} ${summed(inner)}`).join(", ");
  }
  return told(value);
}

export function Facts({ rows }: { rows: Flat }) {
  return (
    <dl class="st-facts">
      {rows.map(([key, value]) => (
        <div key={key}>
          <dt>{key}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

export function Summary({ summary }: { summary: Record<string, unknown> }) {
  return <Facts rows={Object.entries(summary).map(([key, value]) => [key, summed(value)])} />;
}

/** The recipe in its sections: what stands above the first dot. */
export function RecipeTable({ recipe }: { recipe: Record<string, unknown> }) {
  const sections = new Map<string, Flat>();
  for (const [key, value] of flatten(recipe)) {
    const parts = key.split(".");
    const depth = parts.length === 1 ? 0 : parts[0] === "stages" ? Math.min(parts.length - 1, 3) : 1;
    const name = parts.slice(0, depth).join(".");
    sections.set(name, [...(sections.get(name) ?? []), [parts.slice(depth).join("."), value]]);
  }
  return (
    <div class="st-recipe">
      {[...sections].map(([name, rows]) => (
        <section class="card" key={name}>
          {name && <h3 class="mono">{name}</h3>}
          <Facts rows={rows} />
        </section>
      ))}
    </div>
  );
}
