// What the fields of a run's log mean: which belong on one chart, in which group, with which unit.
//
// A field that is not in the table still gets a chart of its own, under its own name, so that a
// new stage can log what it likes and see it here.

export type Source = "step" | "validation";

export interface Curve {
  source: Source;
  field: string;
  /** A key of the studio dictionary, or undefined: the field's own name is shown. */
  label?: string;
  /** For a field that is a list (one number per layer): which one. */
  index?: number;
}

export interface Panel {
  id: string;
  group: Group;
  title?: string;
  hint?: string;
  unit?: string;
  /** Values are multiplied by this before they are shown (100 for shares). */
  factor: number;
  curves: Curve[];
}

export const GROUPS = ["learning", "reward", "answers", "optimizer", "balance", "speed", "other"] as const;
export type Group = (typeof GROUPS)[number];

interface Known {
  fields: string[];
  group: Group;
  title: string;
  unit?: string;
  factor?: number;
  /** The dictionary has a sentence on how to read it, under this key. */
  hint?: string;
}

/** In reading order. Every entry is one panel; `validation:x` is the field x of validations. */
const KNOWN: Known[] = [
  { fields: ["loss", "validation:loss", "mtp_loss", "validation:mtp_loss"], group: "learning", title: "loss", unit: "nats_per_token", hint: "loss_hint" },
  { fields: ["validation:bits_per_character"], group: "learning", title: "bits_per_character", unit: "bits", hint: "bits_hint" },
  { fields: ["accuracy", "validation:accuracy"], group: "learning", title: "accuracy", unit: "percent", factor: 100 },
  { fields: ["validation:mtp_agreement"], group: "learning", title: "mtp_agreement", unit: "percent", factor: 100, hint: "mtp_agreement_hint" },
  { fields: ["distill_loss"], group: "learning", title: "distill_loss", unit: "nats_per_token" },

  { fields: ["reward", "validation:reward", "reward_mean"], group: "reward", title: "reward", hint: "reward_hint" },
  { fields: ["reward_correct", "reward_accuracy", "reward_format", "reward_language", "reward_length"], group: "reward", title: "reward_parts" },
  { fields: ["reward_std"], group: "reward", title: "reward_std" },
  { fields: ["pass_at_1", "pass_at_k", "validation:pass_at_1", "validation:pass_at_k"], group: "reward", title: "pass", unit: "percent", factor: 100, hint: "pass_hint" },
  { fields: ["zero_variance_share"], group: "reward", title: "zero_variance_share", unit: "percent", factor: 100, hint: "zero_variance_hint" },
  { fields: ["advantage_mean", "advantage_std"], group: "reward", title: "advantage" },

  { fields: ["length", "length_right", "length_wrong", "length_mean"], group: "answers", title: "lengths", unit: "tokens", hint: "lengths_hint" },
  { fields: ["truncated_share"], group: "answers", title: "truncated_share", unit: "percent", factor: 100 },
  { fields: ["entropy"], group: "answers", title: "entropy", unit: "nats_per_token", hint: "entropy_hint" },
  { fields: ["kl"], group: "answers", title: "kl", unit: "nats_per_token", hint: "kl_hint" },
  { fields: ["clip_share", "clip_share_low", "clip_share_high"], group: "answers", title: "clip_share", unit: "percent", factor: 100 },
  { fields: ["ratio_mean", "ratio_max"], group: "answers", title: "ratio" },

  { fields: ["lr"], group: "optimizer", title: "lr" },
  { fields: ["grad_norm"], group: "optimizer", title: "grad_norm", hint: "grad_norm_hint" },

  { fields: ["max_violation"], group: "balance", title: "max_violation", hint: "max_violation_hint" },
  { fields: ["balance_loss"], group: "balance", title: "balance_loss" },

  { fields: ["tokens_per_second"], group: "speed", title: "tokens_per_second", unit: "tokens_per_second" },
  { fields: ["peak_share"], group: "speed", title: "peak_share", unit: "percent", factor: 100, hint: "peak_share_hint" },
  { fields: ["flops_per_second"], group: "speed", title: "flops_per_second", unit: "gflops", factor: 1e-9 },
  { fields: ["generate_seconds", "train_seconds", "reward_seconds"], group: "speed", title: "step_parts", unit: "seconds" },
];

/** Fields that place a record and are not themselves a curve. */
const PLACES = new Set(["kind", "step", "stage", "tokens", "seconds", "time"]);

/** `validation:loss` and `step`'s own `loss` in one namespace. */
export function fieldKey(source: Source, field: string): string {
  return source === "step" ? field : `${source}:${field}`;
}

function curveOf(key: string): Curve {
  const [source, field] = key.startsWith("validation:") ? (["validation", key.slice(11)] as const) : (["step", key] as const);
  return { source, field, label: key.replace(":", "_") };
}

export function isCurveField(field: string): boolean {
  return !PLACES.has(field);
}

/**
 * The panels for the fields a log has: `scalars` are keys as of `fieldKey`, `lists` gives the
 * length of each field that is a list of numbers.
 */
export function panelsOf(scalars: Iterable<string>, lists: Map<string, number>): Panel[] {
  const left = new Set(scalars);
  const panels: Panel[] = [];
  for (const known of KNOWN) {
    const curves: Curve[] = [];
    for (const key of known.fields) {
      const width = lists.get(key);
      if (left.delete(key)) curves.push(curveOf(key));
      else if (width) for (let index = 0; index < width; index++) curves.push({ ...curveOf(key), index });
    }
    if (known.title === "pass") curves.push(...takeNumberedPasses(left));
    if (!curves.length) continue;
    const { group, title, unit, hint, factor = 1 } = known;
    panels.push({ id: known.fields[0]!, group, title, unit, hint, factor, curves });
  }
  const named = new Set(KNOWN.flatMap((known) => known.fields));
  for (const key of [...left].sort()) {
    const { source, field } = curveOf(key);
    panels.push({ id: key, group: "other", factor: 1, curves: [{ source, field }] });
  }
  for (const [key, width] of lists) {
    if (named.has(key)) continue;
    const { source, field } = curveOf(key);
    const curves = Array.from({ length: width }, (_, index) => ({ source, field, index }));
    panels.push({ id: key, group: "other", factor: 1, curves });
  }
  return panels;
}

/** `pass_at_8` and its like: the k is in the name. */
function takeNumberedPasses(left: Set<string>): Curve[] {
  const found = [...left].filter((key) => /^(validation:)?pass_at_\d+$/.test(key)).sort(byTrailingNumber);
  for (const key of found) left.delete(key);
  return found.map((key) => ({ ...curveOf(key), label: undefined }));
}

function byTrailingNumber(a: string, b: string): number {
  return Number(a.match(/\d+$/)![0]) - Number(b.match(/\d+$/)![0]);
}

/** A field's own name as words: `zero_variance_share` → "zero variance share". */
export function plainName(field: string): string {
  const pass = /^pass_at_(\d+|k)$/.exec(field);
  return pass ? `pass@${pass[1]}` : field.replaceAll("_", " ");
}
