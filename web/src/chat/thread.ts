// One conversation in the page: its tree, what is being written in it, and what can be done to it.
// Threads outlive their view: an answer goes on while one reads another conversation.
import { computed, signal } from "@preact/signals";
import { me, models, refresh } from "../shell/server";
import type { Model } from "../shell/types";
import * as kept from "./conversations";
import { Live } from "./live";
import { chosenModel, chosenSettings } from "./preferences";
import { question } from "./request";
import { branch, newestLeaf, siblings, withMessage, type Tree } from "./tree";
import { DEFAULTS, type Attachment, type Kept, type Message, type Settings } from "./types";
import { post } from "../shell/api";
import { tellFault } from "../shell/ui";

let count = 0;
const newId = () => `new-${++count}`;

export class Thread {
  readonly id = signal<string | null>(null);
  readonly title = signal("");
  readonly system = signal("");
  readonly settings = signal<Settings>({ ...chosenSettings.peek() });
  readonly modelName = signal<string | null>(null);
  readonly tree = signal<Tree>(new Map());
  readonly leaf = signal<string | null>(null);
  readonly loading = signal(false);
  readonly fault = signal<unknown>(null);
  /** The answers of this session, by their id now; those that ended keep their speed and faults. */
  readonly lives = signal<ReadonlyMap<string, Live>>(new Map());
  /** Messages keep their place in the page when the server gives them an id. */
  readonly keys = new Map<string, string>();

  readonly path = computed(() => branch(this.tree.value, this.leaf.value));
  readonly model = computed<Model | null>(() => {
    const all = models.value ?? [];
    const named = (name: string | null) =>
      all.find((one) => one.id === name || (name !== null && one.aliases.includes(name)));
    return named(this.modelName.value) ?? named(chosenModel.value) ?? all[0] ?? null;
  });
  /** The answer being written on the branch in view. */
  readonly writing = computed<Live | null>(() => {
    const live = this.leaf.value === null ? undefined : this.lives.value.get(this.leaf.value);
    return live && live.phase.value !== "done" ? live : null;
  });
  readonly anyWriting = computed(() =>
    [...this.lives.value.values()].some((live) => !live.ended.value),
  );

  async open(id: string): Promise<void> {
    this.id.value = id;
    this.loading.value = true;
    this.fault.value = null;
    try {
      const all = await kept.read(id);
      this.title.value = all.title;
      this.system.value = all.system ?? "";
      this.settings.value = { ...DEFAULTS, ...all.settings };
      this.modelName.value = all.model;
      this.tree.value = new Map(all.messages.map((one) => [one.id, one]));
      const last = all.messages.at(-1)?.id ?? null;
      this.leaf.value = all.leaf && this.tree.value.has(all.leaf) ? all.leaf : last;
    } catch (fault) {
      this.fault.value = fault;
    }
    this.loading.value = false;
  }

  // -- what a person does -------------------------------------------------------------------

  /** Asks; raises where the question could not be kept, and then nothing has changed. */
  async say(content: string, attachments: Attachment[]): Promise<void> {
    await this.add({ parent: this.leaf.value, role: "user", content, attachments });
    void this.answer();
  }

  /** The same question in other words, beside the first. */
  async edit(message: Message, content: string): Promise<void> {
    const { parent, role, attachments } = message;
    await this.add({ parent, role, content, attachments });
    void this.answer();
  }

  /** Gives the result of a call; once all calls have theirs, the model goes on. */
  async giveResult(answer: Message, call: string, content: string): Promise<void> {
    await this.add({ parent: this.leaf.value, role: "tool", content, tool_call_id: call });
    const given = new Set(this.path.value.map((one) => one.tool_call_id));
    if (answer.tool_calls?.every((one) => given.has(one.id))) void this.answer();
  }

  /** Another answer to the same question. */
  retry(message: Message): void {
    void this.answer(message.parent);
  }

  /** Another try after a fault that left nothing. */
  again(): void {
    const last = this.path.value.at(-1);
    if (!last) return;
    if (last.role === "assistant") this.forget(last);
    void this.answer(last.role === "assistant" ? last.parent : last.id);
  }

  async goOn(message: Message): Promise<void> {
    const model = this.model.value;
    const id = this.id.value;
    if (!model || !id) return;
    const path = branch(this.tree.value, message.id);
    await this.write({ ...message, finish_reason: null }, false, path, true);
  }

  choose(message: Message, step: number): void {
    const all = siblings(this.tree.value, message);
    const other = all[all.findIndex((one) => one.id === message.id) + step];
    if (other) this.show(newestLeaf(this.tree.value, other.id));
  }

  async set(part: { model?: string; system?: string; settings?: Settings }): Promise<void> {
    if (part.model !== undefined) chosenModel.value = this.modelName.value = part.model;
    if (part.system !== undefined) this.system.value = part.system;
    if (part.settings) {
      this.settings.value = part.settings;
      // Tools and seed belong to this conversation.
      chosenSettings.value = { ...part.settings, tools: "", seed: null };
    }
    if (this.id.value) await kept.change(this.id.value, part).catch(tellFault);
  }

  // -- how ----------------------------------------------------------------------------------

  private show(leaf: string): void {
    this.leaf.value = leaf;
    if (this.id.value && !leaf.startsWith("new-"))
      kept.change(this.id.value, { leaf }).catch(tellFault);
  }

  private async add(message: Kept): Promise<Message> {
    if (!this.id.value) await this.begin(message);
    const place = `api/conversations/${encodeURIComponent(this.id.value!)}/messages`;
    const { id } = await post<{ id: string }>(place, message);
    const whole = { ...message, id };
    this.tree.value = withMessage(this.tree.value, whole);
    this.leaf.value = id;
    return whole;
  }

  private async begin(first: Kept): Promise<void> {
    const title = kept.titleOf(first.content || (first.attachments?.[0]?.name ?? ""));
    const model = this.model.value?.id ?? "";
    const made = await kept.make(title, model, this.system.value, this.settings.value);
    this.title.value = made.title;
    this.modelName.value = model;
    opened.set(made.id, this); // before the id is told: whoever hears it asks for the thread
    this.id.value = made.id;
    void kept.load();
  }

  private async answer(parent = this.leaf.value): Promise<void> {
    const model = this.model.value;
    if (!model || !this.id.value) return;
    const begun: Message = {
      id: newId(),
      parent,
      role: "assistant",
      content: "",
      model: model.id,
    };
    this.tree.value = withMessage(this.tree.value, begun);
    this.leaf.value = begun.id;
    await this.write(begun, true, branch(this.tree.value, parent), false);
  }

  private async write(begun: Message, isNew: boolean, path: Message[], onwards: boolean): Promise<void> {
    const live = new Live(this.id.value!, begun, isNew, (message, was) => this.saved(message, was, live));
    this.lives.value = new Map(this.lives.value).set(begun.id, live);
    const model = this.model.value!;
    await live.run(() => question(model, this.system.value, this.settings.value, path, onwards));
    this.tree.value = withMessage(this.tree.value, live.message.value);
    this.lives.value = new Map(this.lives.value);
    void kept.load();
    if (me.value?.balance != null) void refresh();
  }

  private saved(message: Message, was: string, live: Live): void {
    this.keys.set(message.id, this.keys.get(was) ?? was);
    this.tree.value = withMessage(this.tree.value, message, was);
    const lives = new Map(this.lives.value);
    lives.delete(was);
    this.lives.value = lives.set(message.id, live);
    if (this.leaf.value === was) this.leaf.value = message.id;
  }

  private forget(message: Message): void {
    const tree = new Map(this.tree.value);
    if (!message.id.startsWith("new-")) return;
    tree.delete(message.id);
    this.tree.value = tree;
    this.leaf.value = message.parent;
  }
}

const opened = new Map<string, Thread>();

/** The thread of a conversation; a new one for null. */
export function threadOf(id: string | null): Thread {
  const known = id === null ? undefined : opened.get(id);
  if (known && (known.anyWriting.peek() || !known.fault.peek())) return known;
  const thread = new Thread();
  if (id !== null) {
    opened.set(id, thread);
    void thread.open(id);
  }
  return thread;
}

export const writingIn = (id: string): boolean => opened.get(id)?.anyWriting.value ?? false;

export async function renameThread(id: string, title: string): Promise<void> {
  const thread = opened.get(id);
  if (thread) thread.title.value = title;
  await kept.rename(id, title);
}

export function forgetThread(id: string): void {
  opened.get(id)?.writing.value?.stop();
  opened.delete(id);
}
