import { effect } from "@preact/signals";
import { useEffect, useMemo, useState } from "preact/hooks";
import "katex/dist/katex.min.css";
import "./chat.css";
import "./markdown.css";
import { shellWords } from "../i18n/shell";
import { number } from "../i18n";
import { get } from "../shell/api";
import { handover } from "../shell/handover";
import { address, go } from "../shell/router";
import { models, refresh, unreached } from "../shell/server";
import { Icon, Mark } from "../shell/icons";
import { Dialog, IconButton, Spinner, Trouble } from "../shell/ui";
import type { Run } from "../studio/live";
import { roughly } from "../studio/numbers";
import { Composer } from "./composer";
import { Answer, copyText, editing, Question, Result } from "./message";
import { ModelPicker } from "./models";
import { useFollowing } from "./scrolling";
import { SettingsDrawer } from "./settings";
import { Sidebar } from "./sidebar";
import { useShortcuts } from "./shortcuts";
import { threadOf, type Thread } from "./thread";
import { chatWords as t } from "./words";

const NARROW = matchMedia("(max-width: 860px)"); // as in chat.css: the list is a drawer

export function Chat({ conversation }: { conversation: string | null }) {
  const [sideOpen, setSideOpen] = useState(false);
  const [helpOpen, setHelpOpen] = useState(false);
  const [fresh, setFresh] = useState(0); // another empty conversation, also from an empty one
  const thread = useThread(conversation, fresh);
  useShortcuts({
    onSearch: () => {
      const focus = () => document.getElementById("search")?.focus();
      if (!NARROW.matches) return focus();
      setSideOpen(true);
      requestAnimationFrame(focus); // it is not in sight before
    },
    onNew: () => {
      setFresh((count) => count + 1);
      go("chat");
    },
    onEscape: () => {
      if (sideOpen) setSideOpen(false);
      else thread.writing.value?.stop();
    },
    onHelp: () => setHelpOpen(true),
  });
  return (
    <div class="chat">
      <Sidebar open={sideOpen} onClose={() => setSideOpen(false)} />
      <View key={viewName(thread)} thread={thread} onList={() => setSideOpen(true)} onHelp={() => setHelpOpen(true)} />
      {helpOpen && <Help onClose={() => setHelpOpen(false)} />}
    </div>
  );
}

let views = 0;
const names = new WeakMap<Thread, number>();
function viewName(thread: Thread): number {
  if (!names.has(thread)) names.set(thread, ++views);
  return names.get(thread)!;
}

/** The thread of the address; a new one gets its address when its first words are kept. */
function useThread(conversation: string | null, fresh: number): Thread {
  const thread = useMemo(() => threadOf(conversation), [conversation, fresh]);
  useEffect(
    () =>
      effect(() => {
        const id = thread.id.value;
        if (id && id !== conversation) go("chat", id, true);
      }),
    [thread, conversation],
  );
  useEffect(
    () =>
      effect(() => {
        document.title = thread.title.value ? `${thread.title.value} · Qiusuo` : "Qiusuo";
      }),
    [thread],
  );
  return thread;
}

function View({ thread, onList, onHelp }: { thread: Thread; onList: () => void; onHelp: () => void }) {
  const [given, setGiven] = useState<{ text: string } | null>(null);
  const [settingsOpen, setSettingsOpen] = useState(false);
  const path = thread.path.value;
  const { scroller, content, away, toFoot } = useFollowing(thread);
  const isText = thread.model.value?.kind === "text";
  const empty = path.length === 0 && !thread.loading.value && !thread.fault.value;

  useEffect(() => {
    const wish = handover.value;
    if (!wish || thread.id.value) return;
    handover.value = null;
    void thread.set({ model: wish.model });
    if (wish.prompt) setGiven({ text: wish.prompt });
  }, []);
  useEffect(() => () => void (editing.value = null), [thread]);

  return (
    <section class="view" aria-label={shellWords("chat")}>
      <header class="view-head">
        <IconButton class="list-button" icon="menu" label={t("openList")} onClick={onList} />
        <ModelPicker thread={thread} />
        <span class="push" />
        <IconButton class="help-button" icon="keyboard" label={t("shortcuts")} onClick={onHelp} />
      </header>
      <div class="scroller" ref={scroller} onClick={copyCode}>
        <div class={"thread" + (empty ? " empty" : "")} ref={content}>
          {thread.loading.value && path.length === 0 && (
            <div class="middle">
              <Spinner />
            </div>
          )}
          {thread.fault.value !== null && (
            <Trouble fault={thread.fault.value} onRetry={() => void thread.open(thread.id.value!)} />
          )}
          {empty && <Empty thread={thread} isText={isText} onExample={(text) => setGiven({ text })} />}
          {path.map((message, at) => {
            const name = thread.keys.get(message.id) ?? message.id;
            if (message.role === "user")
              return <Question key={name} thread={thread} message={message} isText={isText} />;
            if (message.role === "tool") return <Result key={name} thread={thread} message={message} />;
            const kind = models.value?.find((one) => one.id === message.model)?.kind;
            return (
              <Answer
                key={name}
                name={name}
                thread={thread}
                message={message}
                live={thread.lives.value.get(message.id) ?? null}
                isText={kind === "text"}
                isLast={at === path.length - 1}
              />
            );
          })}
        </div>
      </div>
      <div class="foot">
        {away.value && (
          <button type="button" class="to-latest" aria-label={t("toLatest")} title={t("toLatest")} onClick={() => toFoot(true)}>
            <Icon name="down" />
          </button>
        )}
        <Composer thread={thread} given={given} onSettings={() => setSettingsOpen(true)} onSent={() => toFoot()} />
      </div>
      <Spoken thread={thread} />
      {settingsOpen && <SettingsDrawer thread={thread} onClose={() => setSettingsOpen(false)} />}
    </section>
  );
}

/** Code boxes are made as HTML; their buttons are served from here. */
function copyCode(event: MouseEvent): void {
  const button = (event.target as Element).closest?.(".copy-code");
  const code = button?.closest(".code")?.querySelector("code")?.textContent;
  if (code !== undefined && code !== null) void copyText(code);
}

/** A screen reader hears that an answer began and that it is there, not every word as it comes. */
function Spoken({ thread }: { thread: Thread }) {
  const [said, say] = useState("");
  const writing = thread.writing.value !== null;
  useEffect(() => {
    if (writing) say(t("answerBegun"));
    else if (said) say(t("answerDone"));
  }, [writing]);
  return (
    <div class="unseen" role="status" aria-live="polite">
      {said}
    </div>
  );
}

function Empty(props: { thread: Thread; isText: boolean; onExample: (text: string) => void }) {
  const { thread, isText, onExample } = props;
  const model = thread.model.value;
  const [training, setTraining] = useState<Run | null>(null);
  // The page is up before the models are: they appear by themselves.
  useEffect(() => {
    if (model) return;
    const look = async () => {
      void refresh();
      const runs = await get<Run[]>("api/runs").catch(() => []); // not for every key
      setTraining(runs.find((run) => run.state === "running") ?? null);
    };
    void look();
    const clock = setInterval(() => void look(), 2000);
    return () => clearInterval(clock);
  }, [model === null]);
  if (!model) {
    if (unreached.value) return <Trouble fault={unreached.value} onRetry={() => void refresh()} />;
    if (models.value === null) return <Spinner />;
    return (
      <div class="greeting">
        <Mark size={52} />
        <h1>{training ? t("training", { run: training.id }) : t("noModels")}</h1>
        <p class="soft">{training ? trainingText(training) : t("noModelsText")}</p>
        <a class="button primary" href={training ? address("studio", training.id) : address("studio")}>
          {t("toStudio")}
        </a>
      </div>
    );
  }
  return (
    <div class="greeting">
      <Mark size={52} />
      <h1>{t(isText ? "greetingText" : "greeting")}</h1>
      <p class="soft">{t(isText ? "greetingNoteText" : "greetingNote", { model: model.id })}</p>
      <div class="examples">
        {model.examples.slice(0, 6).map((text) => (
          <button key={text} type="button" class="example" onClick={() => onExample(text)}>
            {text}
          </button>
        ))}
      </div>
    </div>
  );
}

function trainingText(run: Run): string {
  const left = run.eta_seconds == null ? "" : t("trainingLeft", { time: roughly(run.eta_seconds) });
  return t("trainingText", { stage: run.stage, step: number(run.step), steps: number(run.steps), left });
}

function Help({ onClose }: { onClose: () => void }) {
  const mod = navigator.platform.startsWith("Mac") ? "⌘" : "Ctrl";
  const keys: [string, string][] = [
    [`${mod} K`, t("keySearch")],
    [`${mod} Shift O`, t("keyNew")],
    ["Esc", t("keyStop")],
    ["↑", t("keyEdit")],
    ["/", t("keyFocus")],
    ["?", t("keyHelp")],
  ];
  return (
    <Dialog title={t("shortcuts")} onClose={onClose}>
      <p class="soft small-text">{t("keysHint")}</p>
      <dl class="keys">
        {keys.map(([press, what]) => (
          <div key={press}>
            <dt>
              <kbd>{press}</kbd>
            </dt>
            <dd>{what}</dd>
          </div>
        ))}
      </dl>
      <button type="button" class="button" onClick={onClose}>
        {shellWords("close")}
      </button>
    </Dialog>
  );
}
