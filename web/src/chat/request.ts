// A branch of a conversation as the API wants it, and the API's chunks as what they say.
import type { Model } from "../shell/types";
import { eventsOf, Fault } from "../shell/api";
import type { Attachment, Message, Settings, Speed, ToolCall, Usage } from "./types";
import { chatWords as t } from "./words";

/** The files, each in a fence longer than any within it, then the words. */
export function withFiles(content: string, files: Attachment[] | null | undefined): string {
  const told = (files ?? []).map(({ name, text }) => {
    const longest = Math.max(2, ...(text.match(/`+/g) ?? []).map((run) => run.length));
    const fence = "`".repeat(longest + 1);
    return `${t("titleFile", { name })}\n${fence}\n${text.replace(/\n$/, "")}\n${fence}\n\n`;
  });
  return told.join("") + content;
}

function toApi(message: Message): object {
  if (message.role === "user")
    return { role: "user", content: withFiles(message.content, message.attachments) };
  if (message.role === "tool")
    return { role: "tool", tool_call_id: message.tool_call_id, content: message.content };
  if (!message.tool_calls?.length) return { role: "assistant", content: message.content };
  return {
    role: "assistant",
    content: message.content,
    // A loop of tools is one train of thought: the model gets it back.
    reasoning_content: message.reasoning_content ?? "",
    tool_calls: message.tool_calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    })),
  };
}

/** Where nothing is set: OpenAI's 16 would end in the first sentence. */
const TEXT_TOKENS = 256;

export interface Question {
  path: string;
  body: Record<string, unknown>;
}

/** `path`: the messages from the first one on; with `onwards` the last one is an answer to go on with. */
export function question(
  model: Model,
  system: string,
  settings: Settings,
  path: Message[],
  onwards: boolean,
): Question {
  const body: Record<string, unknown> = {
    model: model.id,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"] as const)
    if (settings[name] !== null) body[name] = settings[name];
  if (model.kind === "text") {
    body.max_tokens ??= TEXT_TOKENS;
    body.prompt = path.map((message) => message.content).join("");
    return { path: "v1/completions", body };
  }
  const messages = path.map(toApi);
  if (onwards) {
    const last = path.at(-1)!;
    const thought = last.reasoning_content ? { reasoning_content: last.reasoning_content } : {};
    messages[messages.length - 1] = { role: "assistant", content: last.content, prefix: true, ...thought };
  }
  body.messages = system.trim() ? [{ role: "system", content: system }, ...messages] : messages;
  if (model.thinks) {
    body.thinking = { type: settings.thinking ? "enabled" : "disabled" };
    if (settings.thinking && settings.thinking_budget !== null)
      body.thinking_budget = settings.thinking_budget;
  }
  if (model.tools && settings.tools.trim()) body.tools = JSON.parse(settings.tools);
  return { path: onwards ? "beta/chat/completions" : "v1/chat/completions", body };
}

/** One step of an answer. */
export interface Step {
  content?: string;
  reasoning?: string;
  calls?: { index: number; id?: string; name?: string; arguments?: string }[];
  finish?: string;
  usage?: Usage;
  cost?: string;
  speed?: Speed;
}

/** Reads a stream of chat or text chunks. An error within it is raised as a Fault. */
export async function* stepsOf(answer: Response, signal: AbortSignal): AsyncGenerator<Step> {
  let ended = false;
  for await (const { data } of eventsOf(answer, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Fault(500, String(chunk.error.message ?? data), chunk.error.code);
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    const step: Step = {};
    if (delta.content || choice?.text) step.content = delta.content || choice.text;
    if (delta.reasoning_content) step.reasoning = delta.reasoning_content;
    if (delta.tool_calls)
      step.calls = delta.tool_calls.map((call: { index: number; id?: string; function?: object }) => ({
        index: call.index,
        id: call.id,
        ...call.function,
      }));
    if (choice?.finish_reason) {
      step.finish = choice.finish_reason;
      ended = true;
    }
    if (chunk.usage) step.usage = chunk.usage;
    if (chunk.qiusuo) {
      const { cost, currency, seconds, ttft, tokens_per_second } = chunk.qiusuo;
      if (cost !== null && cost !== undefined) step.cost = `${cost} ${currency}`;
      step.speed = { seconds, ttft, tokens_per_second };
    }
    yield step;
  }
  if (!ended) throw new Fault(0, t("brokenNote"));
}

/** Adds a step's calls to those under way. */
export function joinCalls(calls: ToolCall[], step: NonNullable<Step["calls"]>): ToolCall[] {
  const all = [...calls];
  for (const part of step) {
    const call = all[part.index] ?? { id: "", name: "", arguments: "" };
    all[part.index] = {
      id: part.id ?? call.id,
      name: part.name ?? call.name,
      arguments: call.arguments + (part.arguments ?? ""),
    };
  }
  return all;
}
