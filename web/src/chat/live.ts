// An answer while it is being written. Chunks may come by the hundred in a second; the page is told
// thirty times at most, and the server is given what there is every two seconds, so that closing
// the page, or the machine, loses next to nothing.
import { signal } from "@preact/signals";
import { ask, Fault, patch, post, send } from "../shell/api";
import { joinCalls, stepsOf, type Question, type Step } from "./request";
import { addCost, addUsage } from "./sums";
import type { Message } from "./types";

const SAVE_EVERY = 2000; // milliseconds
const SHOW_EVERY = 33;
const KEPT = [
  "content",
  "reasoning_content",
  "reasoning_seconds",
  "model",
  "usage",
  "cost",
  "speed",
  "finish_reason",
  "tool_calls",
] as const;

export type Phase = "waiting" | "thinking" | "answering" | "done";

export class Live {
  /** The message as it stands now. */
  readonly message;
  readonly phase = signal<Phase>("waiting");
  readonly fault = signal<Fault | null>(null);
  readonly unsaved = signal(false);
  /** The answer is whole, and kept as far as that could be. */
  readonly ended = signal(false);
  /** When the thought began, for the clock; milliseconds of performance.now. */
  thoughtBegan = 0;

  private now: Message;
  private request: string | null = null;
  private readonly abort = new AbortController();
  private frame = 0;
  private shownAt = 0;
  private saving: Promise<void> | null = null;
  private savedAt = 0;
  private dirty = false;
  private stopped = false;

  /** `before`: a message to be filled; with a server's id it is gone on with, else it is made. */
  constructor(
    private readonly conversation: string,
    private readonly before: Message,
    private readonly isNew: boolean,
    private readonly onSaved: (message: Message, was: string) => void,
  ) {
    this.now = before;
    this.message = signal(before);
  }

  /** Runs to the end, whatever the end is; never raises. */
  async run(asks: () => Question): Promise<void> {
    addEventListener("pagehide", this.lastWords);
    try {
      const question = asks();
      const answer = await send(question.path, {
        method: "POST",
        body: question.body,
        signal: this.abort.signal,
      });
      this.request = answer.headers.get("x-request-id");
      if (this.stopped) void this.tellServer("stop");
      for await (const step of stepsOf(answer, this.abort.signal)) this.take(step);
    } catch (fault) {
      if (!this.stopped) {
        this.fault.value = fault instanceof Fault ? fault : new Fault(0, String(fault));
        this.change({ finish_reason: "error" });
      }
    }
    if (this.stopped) this.change({ finish_reason: "stopped" });
    this.endThought();
    this.show();
    this.phase.value = "done";
    const nothing = this.isEmpty && this.fault.value && this.isNew; // was made
    if (!nothing) await this.saveForGood();
    removeEventListener("pagehide", this.lastWords);
    this.ended.value = true;
  }

  get isEmpty(): boolean {
    return !this.now.content && !this.now.reasoning_content && !this.now.tool_calls?.length;
  }

  stop(): void {
    if (this.phase.value === "done") return;
    this.stopped = true;
    void this.tellServer("stop");
    // The server ends the stream and says what it cost; if it does not, we hang up.
    setTimeout(() => this.abort.abort(), this.request ? 1500 : 0);
  }

  endThinking(): void {
    void this.tellServer("end-thinking");
  }

  private async tellServer(what: "stop" | "end-thinking"): Promise<void> {
    if (!this.request) return;
    await post(`api/requests/${encodeURIComponent(this.request)}/${what}`).catch(() => undefined);
  }

  private take(step: Step): void {
    const { now } = this;
    if (step.reasoning) {
      if (this.phase.value !== "thinking") {
        this.phase.value = "thinking";
        this.thoughtBegan = performance.now() - 1000 * (now.reasoning_seconds ?? 0);
      }
      this.change({ reasoning_content: (now.reasoning_content ?? "") + step.reasoning });
    }
    if (step.content || step.calls) {
      this.endThought();
      this.phase.value = "answering";
    }
    if (step.content) this.change({ content: now.content + step.content });
    if (step.calls) this.change({ tool_calls: joinCalls(now.tool_calls ?? [], step.calls) });
    if (step.finish) this.change({ finish_reason: step.finish });
    if (step.usage) this.change({ usage: addUsage(this.before.usage, step.usage) });
    if (step.cost !== undefined) this.change({ cost: addCost(this.before.cost, step.cost) });
    if (step.speed) this.change({ speed: step.speed });
    if (performance.now() - this.savedAt > SAVE_EVERY && !this.saving) void this.save();
  }

  private endThought(): void {
    if (this.phase.value !== "thinking") return;
    this.change({ reasoning_seconds: (performance.now() - this.thoughtBegan) / 1000 });
  }

  private change(part: Partial<Message>): void {
    this.now = { ...this.now, ...part };
    this.dirty = true;
    if (this.frame) return;
    // Half the frames are left to the rest of the page; one in the background gets none at all.
    const wait = document.hidden ? 250 : Math.max(0, this.shownAt + SHOW_EVERY - performance.now());
    this.frame = window.setTimeout(this.show, wait);
  }

  private readonly show = (): void => {
    this.frame = 0;
    this.shownAt = performance.now();
    this.message.value = this.now;
  };

  // -- keeping ------------------------------------------------------------------------------

  private get body(): object {
    const told: Record<string, unknown> = {};
    for (const name of KEPT) if (this.now[name] !== undefined) told[name] = this.now[name];
    return this.stored ? told : { parent: this.now.parent, role: this.now.role, ...told };
  }

  private get stored(): boolean {
    return !this.now.id.startsWith("new-");
  }

  private get place(): string {
    return `api/conversations/${encodeURIComponent(this.conversation)}/messages`;
  }

  private save(): Promise<void> {
    this.saving = this.saveOnce().finally(() => (this.saving = null));
    return this.saving;
  }

  private async saveOnce(): Promise<void> {
    if (!this.dirty && this.stored) return;
    this.savedAt = performance.now();
    this.dirty = false;
    try {
      if (this.stored) {
        await patch(`${this.place}/${encodeURIComponent(this.now.id)}`, this.body);
      } else {
        const { id } = await post<{ id: string }>(this.place, this.body);
        const was = this.now.id;
        this.now = { ...this.now, id };
        this.show();
        this.onSaved(this.now, was);
      }
      this.unsaved.value = false;
    } catch {
      this.dirty = true;
    }
  }

  /** Until it is kept, three times; then the person is told and can try again. */
  async saveForGood(): Promise<void> {
    for (const wait of [0, 500, 2000]) {
      await this.saving;
      await new Promise((resolve) => setTimeout(resolve, wait));
      await this.save();
      if (!this.dirty) return;
    }
    this.unsaved.value = true;
  }

  private readonly lastWords = (): void => {
    if (!this.stored) return;
    void ask(`${this.place}/${encodeURIComponent(this.now.id)}`, {
      method: "PATCH",
      body: this.body,
      keepalive: true,
    }).catch(() => undefined);
  };
}
