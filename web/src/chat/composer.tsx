import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import { Icon } from "../shell/icons";
import { IconButton, tell, Trouble } from "../shell/ui";
import { models } from "../shell/server";
import { readFiles } from "./attachments";
import { editing, fit, isSend } from "./message";
import type { Thread } from "./thread";
import type { Attachment } from "./types";
import { chatWords as t } from "./words";

/** What was begun to be written, per conversation, so that looking elsewhere loses nothing. */
const drafts = new Map<string, { text: string; files: Attachment[] }>();
const coarse = matchMedia("(pointer: coarse)");

export function Composer(props: {
  thread: Thread;
  /** Words put in from elsewhere: an example, Studio's prompt. */
  given: { text: string } | null;
  onSettings: () => void;
  onSent: () => void;
}) {
  const { thread } = props;
  const name = thread.id.value ?? "";
  const [text, setText] = useState(() => drafts.get(name)?.text ?? "");
  const [files, setFiles] = useState<Attachment[]>(() => drafts.get(name)?.files ?? []);
  const [fault, setFault] = useState<unknown>(null);
  const [over, setOver] = useState(false);
  const [sending, setSending] = useState(false);
  /** Asked to send before the models were known. */
  const [eager, setEager] = useState(false);
  const area = useRef<HTMLTextAreaElement>(null);
  const chooser = useRef<HTMLInputElement>(null);

  useEffect(() => {
    drafts.set(name, { text, files });
  }, [text, files, name]);
  useEffect(() => {
    if (!props.given) return;
    setText(props.given.text);
    area.current!.focus();
  }, [props.given]);
  useLayoutEffect(() => fit(area.current!), [text]);
  useEffect(() => {
    if (!coarse.matches) area.current!.focus();
  }, []);

  const model = thread.model.value;
  const writing = thread.writing.value;
  const isText = model?.kind === "text";
  const something = text.trim() !== "" || files.length > 0;
  const ready = Boolean(model) && !sending && something;

  const take = async (list: Iterable<File>) => {
    const { taken, refused } = await readFiles(list);
    for (const why of refused) tell(why, true);
    setFiles((before) => [...before.filter((one) => !taken.some((file) => file.name === one.name)), ...taken]);
  };

  const send = async () => {
    if (models.value === null) return setEager(something);
    if (!ready || writing) return;
    setSending(true);
    setFault(null);
    try {
      props.onSent();
      await thread.say(isText ? text : text.trim(), files);
      drafts.delete(name);
      setText("");
      setFiles([]);
    } catch (why) {
      setFault(why); // the words stay where they are
    }
    setSending(false);
    area.current?.focus();
  };

  useEffect(() => {
    if (!eager || models.value === null) return;
    setEager(false);
    void send();
  }, [eager, models.value]);

  const onKeyDown = (event: KeyboardEvent) => {
    if (isSend(event) && !(coarse.matches && !event.ctrlKey && !event.metaKey)) {
      event.preventDefault();
      void send();
    } else if (event.key === "ArrowUp" && !text && !event.isComposing) {
      const last = thread.path.value.findLast((one) => one.role === "user");
      if (!last || writing) return;
      event.preventDefault();
      editing.value = last.id;
    }
  };

  return (
    <div
      class={"composer" + (over ? " over" : "")}
      onDragOver={(event) => {
        event.preventDefault();
        setOver(true);
      }}
      onDragLeave={() => setOver(false)}
      onDrop={(event) => {
        event.preventDefault();
        setOver(false);
        if (!isText) void take(event.dataTransfer?.files ?? []);
      }}
    >
      {fault !== null && <Trouble fault={fault} onRetry={() => void send()} />}
      <div class="composer-box">
        {files.length > 0 && (
          <ul class="files" aria-label={t("attach")}>
            {files.map((file) => (
              <li key={file.name} class="file-chip">
                <Icon name="file" size={15} />
                <span>{file.name}</span>
                <button
                  type="button"
                  aria-label={t("unattach", { name: file.name })}
                  onClick={() => setFiles(files.filter((one) => one !== file))}
                >
                  <Icon name="close" size={13} />
                </button>
              </li>
            ))}
          </ul>
        )}
        <textarea
          ref={area}
          id="composer"
          rows={1}
          aria-label={t("composer")}
          placeholder={
            model
              ? t(isText ? "placeholderText" : "placeholder", { model: model.id })
              : models.value
                ? t("noModels")
                : ""
          }
          value={text}
          onInput={(event) => {
            setText(event.currentTarget.value);
            setEager(false); // who writes on is not done
          }}
          onKeyDown={onKeyDown}
          onPaste={(event) => {
            const pasted = event.clipboardData?.files;
            if (!pasted?.length || isText) return;
            event.preventDefault();
            void take(pasted);
          }}
        />
        <div class="composer-foot">
          {!isText && (
            <>
              <IconButton icon="attach" label={t("attach")} onClick={() => chooser.current!.click()} />
              <input
                ref={chooser}
                type="file"
                multiple
                hidden
                aria-hidden="true"
                onChange={(event) => {
                  void take([...(event.currentTarget.files ?? [])]);
                  event.currentTarget.value = "";
                }}
              />
            </>
          )}
          <IconButton icon="settings" label={t("settings")} onClick={props.onSettings} />
          {model?.thinks && (
            <button
              type="button"
              class="think-switch"
              aria-pressed={thread.settings.value.thinking}
              title={t("thinkingOn")}
              onClick={() => {
                const settings = thread.settings.value;
                void thread.set({ settings: { ...settings, thinking: !settings.thinking } });
              }}
            >
              <Icon name="thought" size={15} />
              {t("thinking")}
            </button>
          )}
          <span class="push" />
          {writing ? (
            <button type="button" class="send stop" aria-label={t("stop")} title={t("stop")} onClick={() => writing.stop()}>
              <Icon name="stop" size={20} />
            </button>
          ) : (
            <button
              type="button"
              class="send"
              aria-label={t("send")}
              title={t("keysHint")}
              disabled={!ready}
              onClick={() => void send()}
            >
              <Icon name="send" size={20} />
            </button>
          )}
        </div>
      </div>
      <p class="fine-print">{t("mistakes")}</p>
    </div>
  );
}
