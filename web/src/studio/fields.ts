// What the fields of a run's log mean: which belong on one chart, in which group, with which unit.
//
// A field that is not in the table still gets a chart of its own, under its own name, so that a
// new stage can log what it likes and see it here.

export const SOURCES = ["step", "rollout", "validation"] as const;
export type Source = (typeof SOURCES)[number];

export interface Curve {
  source: Source;
  field: string;
  /** A key of the studio dictionary, or undefined: the field's own name is shown. */
  label?: string;
  /** For a field that is a list (one number per layer): which one. */
  index?: number;
  /** For a field that has a value by task: which one. */
  task?: string;
}

export interface Panel {
  id: string;
  group: Group;
  title?: string;
  /** Of held-out problems: what was measured. */
  measure?: string;
  hint?: string;
  unit?: string;
  /** Values are multiplied by this before they are shown (100 for shares). */
  factor: number;
  curves: Curve[];
}

export const GROUPS = ["learning", "reward", "tasks", "answers", "optimizer", "balance", "speed", "other"] as const;
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

/** In reading order. Every entry is one panel; `validation:x` is the field x of validations,
 * `rollout:x` that of the steps of reinforcement. */
const KNOWN: Known[] = [
  { fields: ["loss", "validation:loss", "validation:whole_loss", "mtp_loss", "validation:mtp_loss", "validation:whole_mtp_loss"], group: "learning", title: "loss", unit: "nats_per_token", hint: "loss_hint" },
  { fields: ["validation:bits_per_character", "validation:whole_bits_per_character"], group: "learning", title: "bits_per_character", unit: "bits", hint: "bits_hint" },
  { fields: ["accuracy", "validation:accuracy"], group: "learning", title: "accuracy", unit: "percent", factor: 100 },
  { fields: ["validation:mtp_agreement", "validation:whole_mtp_agreement"], group: "learning", title: "mtp_agreement", unit: "percent", factor: 100, hint: "mtp_agreement_hint" },
  { fields: ["distill_loss"], group: "learning", title: "distill_loss", unit: "nats_per_token" },

  { fields: ["rollout:reward"], group: "reward", title: "reward", hint: "reward_hint" },
  { fields: ["rollout:pass_at_1", "rollout:pass_at_k"], group: "reward", title: "pass", unit: "percent", factor: 100, hint: "pass_hint" },
  { fields: ["rollout:zero_variance_share"], group: "reward", title: "zero_variance_share", unit: "percent", factor: 100, hint: "zero_variance_hint" },
  { fields: ["policy_loss"], group: "reward", title: "policy_loss", hint: "policy_loss_hint" },
  { fields: ["rollout:curriculum"], group: "reward", title: "curriculum" },
  { fields: ["rollout:refills"], group: "reward", title: "refills", hint: "refills_hint" },

  { fields: ["rollout:length", "rollout:length_right", "rollout:length_wrong"], group: "answers", title: "lengths", unit: "tokens", hint: "lengths_hint" },
  { fields: ["rollout:thought", "rollout:trace_valid"], group: "answers", title: "thoughts", unit: "percent", factor: 100, hint: "thoughts_hint" },
  { fields: ["rollout:overlong_share"], group: "answers", title: "overlong_share", unit: "percent", factor: 100 },
  { fields: ["rollout:entropy"], group: "answers", title: "entropy", unit: "nats_per_token", hint: "entropy_hint" },
  { fields: ["rollout:kl"], group: "answers", title: "kl", unit: "nats_per_token", hint: "kl_hint" },
  { fields: ["rollout:clip_share"], group: "answers", title: "clip_share", unit: "percent", factor: 100 },
  { fields: ["rollout:mismatch_kl", "rollout:mismatch_max"], group: "answers", title: "mismatch", unit: "nats_per_token", hint: "mismatch_hint" },

  { fields: ["lr"], group: "optimizer", title: "lr" },
  { fields: ["grad_norm"], group: "optimizer", title: "grad_norm", hint: "grad_norm_hint" },

  { fields: ["max_violation"], group: "balance", title: "max_violation", hint: "max_violation_hint" },
  { fields: ["balance_loss"], group: "balance", title: "balance_loss" },

  { fields: ["tokens_per_second"], group: "speed", title: "tokens_per_second", unit: "tokens_per_second" },
  { fields: ["peak_share"], group: "speed", title: "peak_share", unit: "percent", factor: 100, hint: "peak_share_hint" },
  { fields: ["flops_per_second"], group: "speed", title: "flops_per_second", unit: "gflops", factor: 1e-9 },
  { fields: ["rollout:rollout_seconds", "rollout:update_seconds"], group: "speed", title: "step_parts", unit: "seconds" },
];

/** Fields that place a record and are not themselves a curve. */
const PLACES = new Set(["kind", "step", "stage", "when", "tokens", "seconds", "time", "k", "minutes"]);
/** Of held-out problems: what is about the number of them, not about the model. */
const ABOUT = /^(accuracy_(low|high)|problems):/;
/** Of held-out problems: measures that are no shares, with their units. */
const COUNTS: Record<string, string> = { length: "tokens", sampled_length: "tokens" };
const MOST_TASKS = 8; // lines of one chart: there are no more colours

/** `validation:loss` and `step`'s own `loss` in one namespace. */
export function fieldKey(source: Source, field: string): string {
  return source === "step" ? field : `${source}:${field}`;
}

function curveOf(key: string): Curve {
  const source = SOURCES.find((one) => key.startsWith(one + ":")) ?? "step";
  const field = source === "step" ? key : key.slice(source.length + 1);
  return { source, field, label: source === "validation" ? `validation_${field}` : field };
}

export function isCurveField(field: string): boolean {
  return !PLACES.has(field) && !ABOUT.test(field);
}

/**
 * The panels for the fields a log has: `scalars` are keys as of `fieldKey`, `lists` gives the
 * length of each field that is a list of numbers.
 */
export function panelsOf(scalars: Iterable<string>, lists: Map<string, number>): Panel[] {
  const left = new Set(scalars);
  const panels: Panel[] = takeTasks(left);
  for (const known of KNOWN) {
    const curves: Curve[] = [];
    for (const key of known.fields) {
      const width = lists.get(key);
      if (left.delete(key)) curves.push(curveOf(key));
      else if (width) for (let index = 0; index < width; index++) curves.push({ ...curveOf(key), index });
    }
    if (!curves.length) continue;
    const { group, title, unit, hint, factor = 1 } = known;
    panels.push({ id: known.fields[0]!, group, title, unit, hint, factor, curves });
  }
  const named = new Set(KNOWN.flatMap((known) => known.fields));
  for (const key of [...left].sort()) {
    const { source, field } = curveOf(key);
    const group = source === "rollout" ? "answers" : "other";
    panels.push({ id: key, group, factor: 1, curves: [{ source, field }] });
  }
  for (const [key, width] of lists) {
    if (named.has(key)) continue;
    const { source, field } = curveOf(key);
    const curves = Array.from({ length: width }, (_, index) => ({ source, field, index }));
    panels.push({ id: key, group: "other", factor: 1, curves });
  }
  return panels;
}

/** One panel for each measure that there is by task. */
function takeTasks(left: Set<string>): Panel[] {
  const found = new Map<string, string[]>();
  for (const key of left) {
    const parts = /^((?:rollout|validation):[^:]+):(.+)$/.exec(key);
    if (!parts) continue;
    found.set(parts[1]!, [...(found.get(parts[1]!) ?? []), parts[2]!]);
    left.delete(key);
  }
  return [...found].map(([id, tasks]) => {
    const { source, field } = curveOf(id);
    const curves = spread(tasks.sort(byName), MOST_TASKS).map((task) => ({ source, field: `${field}:${task}`, task }));
    if (source === "rollout") return { id, group: "tasks", title: field, unit: "percent", factor: 100, curves };
    const unit = COUNTS[field] ?? "percent";
    const hint = field === "accuracy" ? "held_out_hint" : undefined;
    return { id, group: "tasks", measure: field, unit, hint, factor: unit === "percent" ? 100 : 1, curves };
  });
}

/** Numbers in names by their size: chains/5 before chains/10. */
const byName = new Intl.Collator("en", { numeric: true }).compare;

/** At most `most`, evenly among them. */
function spread<T>(items: T[], most: number): T[] {
  if (items.length <= most) return items;
  return Array.from({ length: most }, (_, i) => items[Math.round((i * (items.length - 1)) / (most - 1))]!);
}

/** A field's own name as words: `zero_variance_share` → "zero variance share". */
export function plainName(field: string): string {
  const pass = /^pass_at_(\d+|k)$/.exec(field);
  return pass ? `pass@${pass[1]}` : field.replaceAll("_", " ");
}
