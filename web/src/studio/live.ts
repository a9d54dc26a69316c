// A run as it is and as it grows: its page asks once for what there is, then listens.

import { signal, type Signal } from "@preact/signals";
import { events, Fault, get } from "../shell/api";
import { RunRecords, type LogRecord } from "./records";

export interface Run {
  /** The name of its folder. */
  id: string;
  name: string;
  recipe: string;
  /** starting, running, finished, failed, interrupted or killed. */
  state: string;
  /** Seconds since 1970. */
  started: number;
  step: number;
  /** 0: not known. */
  steps: number;
  stage: string;
  /** 0 to 1. */
  progress: number;
  eta_seconds: number | null;
  loss: number | string | null;
  best: number | string | null;
  /** Of the last step, while a stage of reinforcement trains. */
  reward: number | string | null;
  /** Whether there is a model to talk to, a report to read. */
  model: boolean;
  report: boolean;
  error: string | null;
  served_as?: string | null;
}

export interface RunDetail extends Omit<Run, "recipe"> {
  recipe: Record<string, unknown>;
  environment: Record<string, unknown>;
  summary: Record<string, unknown>;
  /** The end of what the training printed. */
  console: string;
}

interface Records {
  records: LogRecord[];
  next: number;
}

/** Redrawing more often than this only warms the machine. */
const DRAW_EVERY = 300; // milliseconds
const PATIENCE = [500, 1000, 2000, 5000, 10_000]; // between attempts to connect again

export class LiveRun {
  records = new RunRecords();
  readonly run: Signal<RunDetail | null> = signal(null);
  /** Counts up when there is something new to draw. */
  readonly version = signal(0);
  readonly fault: Signal<unknown> = signal(null);
  readonly loaded = signal(false);
  readonly connected = signal(false);

  private ended = new AbortController();
  /** What is there must be asked for (again). */
  private stale = true;
  /** How far the log and the samples have been read, in bytes. */
  private next: [number, number] = [0, 0];
  private drawing: ReturnType<typeof setTimeout> | undefined;
  private attempts = 0;

  constructor(readonly id: string) {}

  private get path(): string {
    return `api/runs/${encodeURIComponent(this.id)}`;
  }

  /** Loads and, when `listen`, follows until `end`. */
  async begin(listen = true): Promise<void> {
    const { signal } = this.ended;
    while (!signal.aborted) {
      try {
        if (this.stale) await this.load();
        if (!listen) return;
        await this.follow();
      } catch (fault) {
        if (signal.aborted) return;
        this.fault.value = fault;
        if (fault instanceof Fault && fault.status >= 400 && fault.status < 500) return;
      }
      this.connected.value = false;
      await new Promise((go) => setTimeout(go, PATIENCE[Math.min(this.attempts++, PATIENCE.length - 1)]));
    }
  }

  private async load(): Promise<void> {
    const { signal } = this.ended;
    const [run, log, samples] = await Promise.all([
      get<RunDetail>(this.path, signal),
      get<Records>(`${this.path}/records`, signal),
      get<Records>(`${this.path}/records?kind=sample`, signal),
    ]);
    this.run.value = run;
    this.records = new RunRecords();
    for (const record of [...log.records, ...samples.records]) this.records.add(record);
    this.next = [log.next, samples.next];
    this.stale = false;
    this.loaded.value = true;
    this.fault.value = null;
    this.version.value++;
  }

  private async follow(): Promise<void> {
    const { signal } = this.ended;
    const path = `${this.path}/live?after=${this.next[0]}&samples_after=${this.next[1]}`;
    for await (const { event, data, id } of events(path, { signal })) {
      this.connected.value = true;
      this.attempts = 0;
      this.fault.value = null;
      if (event === "reset") {
        // A resumed run took back its last steps. What is drawn stands until the rest is there, and
        // is then changed in place: no zoom and no scrolled page is lost.
        this.stale = true;
        return;
      }
      if (event === "record") this.records.add(JSON.parse(data) as LogRecord);
      else if (event === "state") this.take(JSON.parse(data) as Partial<RunDetail>);
      const places = id.split("-").map(Number);
      if (places.length === 2 && places.every(Number.isSafeInteger)) this.next = places as [number, number];
      this.drawSoon();
    }
  }

  /** A state event tells what changes as the run goes, and never the recipe as a whole. */
  private take(state: Partial<RunDetail>): void {
    const { recipe: _, ...rest } = state;
    const before = this.run.value;
    if (!before) return;
    this.run.value = { ...before, ...rest };
    if (before.state !== this.run.value.state) void this.refresh();
  }

  /** The summary and the model are there when a run has ended. */
  async refresh(): Promise<void> {
    try {
      this.run.value = await get<RunDetail>(this.path, this.ended.signal);
    } catch {
      // the stream tells of what is wrong
    }
  }

  private drawSoon(): void {
    this.drawing ??= setTimeout(() => {
      this.drawing = undefined;
      this.version.value++;
    }, DRAW_EVERY);
  }

  end(): void {
    this.ended.abort();
    clearTimeout(this.drawing);
  }
}
