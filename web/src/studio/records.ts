// The records of one run, kept as columns that charts can draw, growing as lines are appended.
//
// JSON has no NaN: the log writes it as the string "NaN" (and "Infinity"), and a chart shows a gap
// there. A resumed run may write steps a second time; what was later than such a step is dropped.

import { fieldKey, isCurveField, SOURCES, type Source } from "./fields";

export interface LogRecord {
  kind: string;
  step?: number;
  [field: string]: unknown;
}

export interface Sample {
  step: number;
  prompt: string;
  continuation: string;
}

export interface Happening {
  step?: number;
  text: string;
  seconds?: number;
}

export type XAxis = "step" | "tokens" | "seconds";
export type Column = (number | null)[];

const MOST_TEXTS = 400; // samples and events kept: the newest

/** One kind of record as columns of one length. */
class Table {
  steps: number[] = [];
  tokens: Column = [];
  seconds: Column = [];
  scalars = new Map<string, Column>();
  lists = new Map<string, Column[]>();

  add(record: LogRecord): void {
    const row = this.steps.length;
    this.steps.push(record.step!);
    this.tokens.push(finite(record.tokens));
    this.seconds.push(finite(record.seconds));
    for (const [field, value] of fieldsOf(record)) {
      if (!isCurveField(field)) continue;
      if (isNumeric(value)) put(columnOf(this.scalars, field), row, finite(value));
      else if (isNumericList(value)) this.addList(field, row, value);
    }
  }

  private addList(field: string, row: number, values: unknown[]): void {
    const columns = this.lists.get(field) ?? [];
    this.lists.set(field, columns);
    values.forEach((value, index) => put((columns[index] ??= []), row, finite(value)));
  }

  /** Keep what comes before `step`. */
  cut(step: number): void {
    let rows = this.steps.length;
    while (rows > 0 && this.steps[rows - 1]! >= step) rows--;
    this.steps.length = this.tokens.length = this.seconds.length = rows;
    const columns = [...this.scalars.values(), ...[...this.lists.values()].flat()];
    for (const column of columns) column.length = Math.min(column.length, rows);
  }

  column(field: string, index?: number): Column {
    return (index === undefined ? this.scalars.get(field) : this.lists.get(field)?.[index]) ?? [];
  }
}

export interface Load {
  step: number;
  /** Per MoE layer, per expert: 1.0 is an even share. */
  rows: Column[];
}

export class RunRecords {
  readonly tables: Record<Source, Table> = { step: new Table(), rollout: new Table(), validation: new Table() };
  loads: Load[] = [];
  samples: Sample[] = [];
  events: Happening[] = [];
  /** Where stages begin: [first step, name]. */
  stages: [number, string][] = [];
  /** Stages of reinforcement: their loss is that of a policy and belongs on no chart of others. */
  private policies = new Set<unknown>();

  add(record: LogRecord): void {
    const { kind, step } = record;
    if (isSource(kind) && typeof step === "number") this.addNumbers(kind, record);
    else if (kind === "sample") this.addSample(record as unknown as Sample);
    else if (kind === "event") this.events = withLatest(this.events, record as unknown as Happening);
  }

  private addNumbers(kind: Source, record: LogRecord): void {
    const table = this.tables[kind];
    const step = record.step!;
    const last = table.steps.at(-1);
    if (last !== undefined && step <= last) {
      table.cut(step);
      if (kind === "step") this.loads = this.loads.filter((load) => load.step < step);
      if (kind === "step" && step < last) this.forgetFrom(step);
    }
    if (kind === "rollout") this.policies.add(record.stage);
    const { loss, ...others } = record;
    const ofPolicy = kind === "step" && loss !== undefined && this.policies.has(record.stage);
    table.add(ofPolicy ? { ...others, policy_loss: loss } : kind === "validation" ? bySet(record) : record);
    if (kind === "validation") return;
    if (kind === "step" && isLoad(record.expert_load)) this.loads.push({ step, rows: record.expert_load.map((row) => row.map(finite)) });
    if (typeof record.stage === "string" && this.stages.at(-1)?.[1] !== record.stage) {
      this.stages.push([step, record.stage]);
    }
  }

  /** A broken connection may have the last few told again. */
  private addSample(sample: Sample): void {
    const same = ({ step, prompt, continuation }: Sample) =>
      step === sample.step && prompt === sample.prompt && continuation === sample.continuation;
    if (!this.samples.slice(-50).some(same)) this.samples = withLatest(this.samples, sample);
  }

  private forgetFrom(step: number): void {
    this.tables.validation.cut(step);
    this.tables.rollout.cut(step);
    this.samples = this.samples.filter((sample) => sample.step < step);
    this.stages = this.stages.filter(([first]) => first < step);
  }

  get count(): number {
    return this.tables.step.steps.length;
  }

  scalarKeys(): string[] {
    return SOURCES.flatMap((source) =>
      [...this.tables[source].scalars].filter(([, column]) => column.length).map(([field]) => fieldKey(source, field)),
    );
  }

  listKeys(): Map<string, number> {
    return new Map(
      SOURCES.flatMap((source) =>
        [...this.tables[source].lists].map(([field, columns]) => [fieldKey(source, field), columns.length] as const),
      ),
    );
  }

  /** Where each record of `source` stands on the x axis. */
  xs(source: Source, axis: XAxis): Column {
    const table = this.tables[source];
    if (axis === "step") return table.steps;
    // A validation's own "tokens" are those it looked at, and rollouts have none; the tokens trained
    // on are their step's.
    return source === "step" ? table[axis] : table.steps.map((step) => this.placeOf(step, axis));
  }

  /** Where a step stands on the x axis. */
  placeOf(step: number, axis: XAxis): number | null {
    if (axis === "step") return step;
    const { steps, [axis]: places } = this.tables.step;
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (steps[middle]! <= step) low = middle;
      else high = middle - 1;
    }
    if (!steps.length) return null;
    const here = places[low] ?? null;
    const next = places[low + 1] ?? null;
    const [from, to] = [steps[low]!, steps[low + 1]];
    // A thinned log may lack the very step: between two, in proportion.
    if (here === null || next === null || to === undefined || step <= from) return here;
    return here + ((next - here) * (step - from)) / (to - from);
  }

  /** Points of one curve: places and values of one length, both finite or null. */
  curve(source: Source, field: string, axis: XAxis, index?: number): [number[], Column] {
    const places = this.xs(source, axis);
    const values = this.tables[source].column(field, index);
    const xs: number[] = [];
    const ys: Column = [];
    for (let row = 0; row < values.length; row++) {
      const place = places[row];
      const value = values[row];
      if (place == null || value === undefined) continue; // not logged in this record
      xs.push(place);
      ys.push(value);
    }
    return [xs, ys];
  }

  /** Of a field that is a list: the largest, or the mean, of each record. */
  across(source: Source, field: string, axis: XAxis, which: "max" | "mean"): [number[], Column] {
    const width = this.tables[source].lists.get(field)?.length ?? 0;
    const all = Array.from({ length: width }, (_, index) => this.curve(source, field, axis, index));
    const ys = (all[0]?.[1] ?? []).map((_, row) => {
      const values = all.map(([, column]) => column[row]).filter((value) => value != null);
      if (!values.length) return null;
      return which === "max" ? Math.max(...values) : values.reduce((sum, value) => sum + value, 0) / values.length;
    });
    return [all[0]?.[0] ?? [], ys];
  }

  /** The mean of the latest twenty: a single step says little. */
  lastSmoothed(field: string): number | null {
    const latest = this.tables.step.column(field).slice(-20).filter((value) => value != null);
    return latest.length ? latest.reduce((sum, value) => sum + value, 0) / latest.length : null;
  }

  last(field: string, source: Source = "step"): number | null {
    const column = this.tables[source].column(field);
    for (let row = column.length - 1; row >= 0; row--) if (column[row] != null) return column[row]!;
    return null;
  }

  /** The stage that a field's latest value is of; null in a run of one stage. */
  stageOf(field: string, source: Source = "step"): string | null {
    if (this.stages.length < 2) return null;
    const { steps } = this.tables[source];
    const column = this.tables[source].column(field);
    let row = column.length - 1;
    while (row >= 0 && column[row] == null) row--;
    return row < 0 ? null : (this.stages.findLast(([first]) => first <= steps[row]!)?.[1] ?? null);
  }
}

function columnOf(columns: Map<string, Column>, field: string): Column {
  let column = columns.get(field);
  if (!column) columns.set(field, (column = []));
  return column;
}

/** Rows between are left absent (undefined), which is not the same as null: not a number. */
function put(column: Column, row: number, value: number | null): void {
  column[row] = value;
}

const SPECIAL = new Set(["NaN", "Infinity", "-Infinity"]);

function isNumeric(value: unknown): boolean {
  return typeof value === "number" || (typeof value === "string" && SPECIAL.has(value));
}

function isNumericList(value: unknown): value is unknown[] {
  return Array.isArray(value) && value.length > 0 && value.every(isNumeric);
}

function isLoad(value: unknown): value is unknown[][] {
  return Array.isArray(value) && value.length > 0 && value.every(Array.isArray);
}

function finite(value: unknown): number | null {
  return typeof value === "number" && Number.isFinite(value) ? value : null;
}

/** A new list, since a component is drawn anew only when what it was given is another one. */
function withLatest<T>(list: T[], item: T): T[] {
  return [...list.slice(1 - MOST_TEXTS), item];
}

/** Before and after a stage all of the held-out text is read, on the way a part of it: figures of
 * the two make no one curve. */
function bySet(record: LogRecord): LogRecord {
  if (record.when === undefined) return record;
  return Object.fromEntries(Object.entries(record).map(([field, value]) => [OF_TEXT.has(field) ? `whole_${field}` : field, value])) as LogRecord;
}
const OF_TEXT = new Set(["loss", "bits_per_character", "mtp_loss", "mtp_agreement"]);

function isSource(kind: string): kind is Source {
  return (SOURCES as readonly string[]).includes(kind);
}

/** A record's fields; what it holds by task becomes a field for each: "by_task:chains/5",
 * "accuracy:chains/5". */
function* fieldsOf(record: LogRecord): Generator<[string, unknown]> {
  for (const [field, value] of Object.entries(record)) {
    if (!isTable(value)) yield [field, value];
    else if (field !== "tasks") for (const [task, rate] of Object.entries(value)) yield [`${field}:${task}`, rate];
    else {
      for (const [task, measures] of Object.entries(value)) {
        if (!isTable(measures)) continue;
        for (const [measure, one] of Object.entries(measures)) yield [`${measure}:${task}`, one];
      }
    }
  }
}

function isTable(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
