// One message: a person's words, a model's answer with its thought and its figures, a tool's result.
import { signal } from "@preact/signals";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { duration, number } from "../i18n";
import { Icon } from "../shell/icons";
import { IconButton, tell, tellFault, Trouble } from "../shell/ui";
import { shellWords } from "../i18n/shell";
import type { Live } from "./live";
import { Markdown } from "./markdown-view";
import type { Thread } from "./thread";
import { siblings } from "./tree";
import type { Message, ToolCall } from "./types";
import { chatWords as t } from "./words";

export async function copyText(text: string): Promise<void> {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without https on another machine there is no clipboard; the old way still works there.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  tell(shellWords("copied"));
}

/** Grows with its text. */
export function fit(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = area.scrollHeight + 2 + "px";
}

/** Enter that ends the composition of a Chinese or Japanese word is not the Enter that sends. */
export function isSend(event: KeyboardEvent): boolean {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function Branches({ thread, message }: { thread: Thread; message: Message }) {
  const all = siblings(thread.tree.value, message);
  if (all.length < 2) return null;
  const at = all.findIndex((one) => one.id === message.id);
  return (
    <span class="branches" role="group" aria-label={t("branch", { n: at + 1, all: all.length })}>
      <IconButton
        icon="left"
        size={15}
        label={t("branchBefore")}
        disabled={at === 0}
        onClick={() => thread.choose(message, -1)}
      />
      <span class="numbers" aria-hidden="true">
        {at + 1}/{all.length}
      </span>
      <IconButton
        icon="right"
        size={15}
        label={t("branchAfter")}
        disabled={at === all.length - 1}
        onClick={() => thread.choose(message, 1)}
      />
    </span>
  );
}

/** The message being edited, if any; the arrow key in the composer sets it. */
export const editing = signal<string | null>(null);

export function Question(props: { thread: Thread; message: Message; isText: boolean }) {
  const { thread, message, isText } = props;
  if (editing.value === message.id) return <Editor thread={thread} message={message} />;
  return (
    <article class={"message question" + (isText ? " opening" : "")} aria-label={t("you")}>
      {!!message.attachments?.length && (
        <div class="files">
          {message.attachments.map((file) => (
            <details key={file.name} class="file">
              <summary>
                <Icon name="file" size={15} /> {file.name}
              </summary>
              <pre tabIndex={0}>{file.text}</pre>
            </details>
          ))}
        </div>
      )}
      {message.content && <div class="words">{message.content}</div>}
      <div class="actions">
        <Branches thread={thread} message={message} />
        <IconButton icon="copy" size={16} label={t("copy")} onClick={() => copyText(message.content)} />
        <IconButton
          icon="edit"
          size={16}
          label={t("edit")}
          disabled={thread.writing.value !== null}
          onClick={() => (editing.value = message.id)}
        />
      </div>
    </article>
  );
}

function Editor({ thread, message }: { thread: Thread; message: Message }) {
  const [text, setText] = useState(message.content);
  const area = useRef<HTMLTextAreaElement>(null);
  useEffect(() => {
    const { current } = area;
    current!.focus();
    current!.setSelectionRange(text.length, text.length);
  }, []);
  useLayoutEffect(() => fit(area.current!), [text]);
  const end = () => (editing.value = null);
  const save = () => {
    if (!text.trim()) return;
    end();
    thread.edit(message, text).catch((fault) => {
      editing.value = message.id;
      tellFault(fault);
    });
  };
  return (
    <div class="message question editor">
      <textarea
        ref={area}
        class="input"
        aria-label={t("editLabel")}
        value={text}
        onInput={(event) => setText(event.currentTarget.value)}
        onKeyDown={(event) => {
          if (event.key === "Escape") {
            event.stopPropagation();
            end();
          } else if (isSend(event)) {
            event.preventDefault();
            save();
          }
        }}
      />
      <div class="row end">
        <button type="button" class="button small quiet" onClick={end}>
          {shellWords("cancel")}
        </button>
        <button type="button" class="button small primary" disabled={!text.trim()} onClick={save}>
          {t("saveEdit")}
        </button>
      </div>
    </div>
  );
}

/** Which thoughts the person opened or closed; what they chose holds. */
const openThoughts = signal<ReadonlyMap<string, boolean>>(new Map());

function useSeconds(running: boolean, began: number): number {
  const [, tick] = useState(0);
  useEffect(() => {
    if (!running) return;
    const clock = setInterval(() => tick((count) => count + 1), 200);
    return () => clearInterval(clock);
  }, [running]);
  return running ? (performance.now() - began) / 1000 : 0;
}

const wholeSeconds = (seconds: number) =>
  seconds < 0.95 ? duration(seconds) : duration(Math.round(seconds)).replace(".0", "");

function Thought({ name, message, live }: { name: string; message: Message; live: Live | null }) {
  const running = live?.phase.value === "thinking";
  const seconds = useSeconds(running, live?.thoughtBegan ?? 0);
  const text = message.reasoning_content ?? "";
  const inside = useRef<HTMLDivElement>(null);
  const chosen = openThoughts.value.get(name);
  const open = chosen ?? running;
  // While it comes, the window on the thought stays at its end, unless the person scrolled in it.
  const follows = useRef(true);
  useLayoutEffect(() => {
    if (running && open && follows.current) inside.current!.scrollTop = inside.current!.scrollHeight;
  });
  if (!text && !running) return null;
  const toggle = () => (openThoughts.value = new Map(openThoughts.value).set(name, !open));
  const said = running
    ? seconds < 1
      ? t("thinkingBegins")
      : t("thinkingFor", { time: wholeSeconds(Math.floor(seconds)) })
    : message.reasoning_seconds != null
      ? t("thoughtFor", { time: wholeSeconds(message.reasoning_seconds) })
      : t("thought");
  return (
    <section class={"thought" + (running ? " running" : "") + (open ? " open" : "")}>
      <div class="thought-head">
        <button type="button" class="thought-switch" aria-expanded={open} onClick={toggle}>
          <Icon name="thought" size={16} />
          <span class="numbers">{said}</span>
          <Icon name="down" size={15} />
        </button>
        {running && (
          <button
            type="button"
            class="button small quiet"
            aria-label={t("endThinkingLabel")}
            onClick={() => live!.endThinking()}
          >
            <Icon name="skip" size={15} />
            {t("endThinking")}
          </button>
        )}
      </div>
      {open && (
        <div
          class="thought-text"
          ref={inside}
          tabIndex={0}
          onScroll={(event) => {
            const { scrollTop, scrollHeight, clientHeight } = event.currentTarget;
            follows.current = scrollHeight - scrollTop - clientHeight < 24;
          }}
        >
          <Markdown text={text} growing={running} />
        </div>
      )}
    </section>
  );
}

function pretty(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // still coming, or not JSON at all
  }
}

function Call(props: { thread: Thread; message: Message; call: ToolCall; waits: boolean }) {
  const { thread, message, call, waits } = props;
  const [result, setResult] = useState("");
  const give = (event: Event) => {
    event.preventDefault();
    thread.giveResult(message, call.id, result).catch(tellFault);
  };
  return (
    <section class="call">
      <header>
        <Icon name="tool" size={16} />
        {t("toolCall", { name: call.name })}
      </header>
      <pre tabIndex={0}>{pretty(call.arguments)}</pre>
      {waits && (
        <form class="row" onSubmit={give}>
          <input
            class="input"
            placeholder={t("toolAnswer")}
            aria-label={t("toolResult", { name: call.name })}
            value={result}
            onInput={(event) => setResult(event.currentTarget.value)}
          />
          <button type="submit" class="button small">
            {t("toolSend")}
          </button>
        </form>
      )}
    </section>
  );
}

function Figures({ message }: { message: Message }) {
  const { usage, speed, cost } = message;
  const told: string[] = [];
  if (usage) {
    const thought = usage.completion_tokens_details?.reasoning_tokens ?? 0;
    const n = number(usage.completion_tokens);
    told.push(thought ? t("tokensThought", { n, thought: number(thought) }) : t("tokens", { n }));
  }
  if (speed?.tokens_per_second) {
    const { tokens_per_second: rate } = speed;
    told.push(t("perSecond", { n: number(rate, rate < 20 ? 1 : 0) }));
  }
  if (speed?.ttft != null) told.push(t("firstAfter", { time: duration(speed.ttft) }));
  if (usage) {
    const hit = usage.prompt_cache_hit_tokens ?? usage.prompt_tokens_details?.cached_tokens ?? 0;
    told.push(t("cacheHits", { hit: number(hit), all: number(usage.prompt_tokens) }));
  }
  if (cost != null && /[1-9]/.test(cost)) told.push(t("cost", { amount: cost }));
  if (message.model) told.push(message.model);
  return (
    <div class="figures numbers">
      {told.map((one, at) => (
        <span key={at}>{one}</span>
      ))}
    </div>
  );
}

export function Answer(props: {
  thread: Thread;
  message: Message;
  live: Live | null;
  name: string;
  isText: boolean;
  isLast: boolean;
}) {
  const { thread, live, name, isText, isLast } = props;
  const message = live ? live.message.value : props.message;
  const phase = live ? live.phase.value : "done";
  const writing = phase !== "done";
  const fault = live?.fault.value ?? null;
  const idle = thread.writing.value === null;
  return (
    <article
      class={"message answer" + (isText ? " text" : "")}
      aria-label={message.model ?? ""}
      aria-busy={live !== null && !live.ended.value}
    >
      <Thought name={name} message={message} live={live} />
      {phase === "waiting" && !message.content && (
        <p class="waiting">
          <span class="dots" aria-hidden="true">
            <i />
            <i />
            <i />
          </span>
          {t("waiting")}
        </p>
      )}
      {message.content &&
        (isText ? (
          <div class="continued">{message.content}</div>
        ) : (
          <Markdown text={message.content} growing={writing} />
        ))}
      {message.tool_calls?.map((call) => (
        <Call key={call.id} thread={thread} message={message} call={call} waits={!writing && isLast} />
      ))}
      {fault ? (
        <Trouble fault={fault} onRetry={() => again(thread, message, live!)} />
      ) : (
        !writing && <Note message={message} />
      )}
      {live?.unsaved.value && (
        <div class="row note">
          {t("unsaved")}
          <button type="button" class="button small" onClick={() => live.saveForGood()}>
            {t("saveAgain")}
          </button>
        </div>
      )}
      {writing ? (
        <Branches thread={thread} message={message} />
      ) : (
        <footer class="answer-foot">
          <div class="actions">
            <Branches thread={thread} message={message} />
            <IconButton icon="copy" size={16} label={t("copyAnswer")} onClick={() => copyText(message.content)} />
            <IconButton
              icon="retry"
              size={16}
              label={t("retry")}
              disabled={!idle}
              onClick={() => thread.retry(message)}
            />
            {isLast && canGoOn(message) && (
              <button
                type="button"
                class="button small quiet"
                disabled={!idle}
                onClick={() => thread.goOn(message)}
              >
                <Icon name="play" size={14} />
                {t("goOn")}
              </button>
            )}
          </div>
          <Figures message={message} />
        </footer>
      )}
    </article>
  );
}

/** After a fault: on from what there is, or from the question if there is nothing. */
function again(thread: Thread, message: Message, live: Live): void {
  if (live.isEmpty) thread.again();
  else void thread.goOn(message);
}

function canGoOn(message: Message): boolean {
  if (message.tool_calls?.length) return false;
  return message.finish_reason !== "stop" && Boolean(message.content || message.reasoning_content);
}

function Note({ message }: { message: Message }) {
  const { finish_reason: reason } = message;
  const empty = !message.content && !message.tool_calls?.length;
  let said = "";
  if (reason === "stopped") said = t("stoppedNote");
  else if (reason === "length") said = t("lengthNote");
  else if (empty && reason === "stop") said = t("emptyNote");
  else if (reason !== "stop" && reason !== "tool_calls") said = t("brokenNote");
  return said ? <p class="note">{said}</p> : null;
}

export function Result({ thread, message }: { thread: Thread; message: Message }) {
  const calls = thread.path.value.flatMap((one) => one.tool_calls ?? []);
  const name = calls.find((one) => one.id === message.tool_call_id)?.name ?? "";
  return (
    <section class="message call result">
      <header>
        <Icon name="check" size={16} />
        {t("toolResult", { name })}
      </header>
      <pre tabIndex={0}>{message.content}</pre>
    </section>
  );
}
