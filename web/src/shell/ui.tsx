// The few parts that every area needs. Dialogs and menus are the browser's own elements where it
// has them: they trap the focus and close on Escape by themselves.
import { signal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { shellWords as t } from "../i18n/shell";
import { Fault } from "./api";
import { Icon, type IconName } from "./icons";

interface ButtonProps {
  icon: IconName;
  /** What it does; shown as a tip and read aloud. */
  label: string;
  onClick: (event: MouseEvent) => void;
  disabled?: boolean;
  pressed?: boolean;
  class?: string;
  size?: number;
}

export function IconButton({ icon, label, onClick, disabled, pressed, size, ...rest }: ButtonProps) {
  return (
    <button
      type="button"
      class={"icon-button " + (rest.class ?? "")}
      aria-label={label}
      title={label}
      aria-pressed={pressed}
      disabled={disabled}
      onClick={onClick}
    >
      <Icon name={icon} size={size} />
    </button>
  );
}

export function Dialog(props: {
  title: string;
  onClose: () => void;
  children: ComponentChildren;
  /** "side" slides in from the right. */
  kind?: "middle" | "side";
}) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const dialog = box.current!;
    const before = document.activeElement as HTMLElement | null;
    dialog.showModal();
    return () => {
      dialog.close();
      before?.focus?.();
    };
  }, []);
  return (
    <dialog
      ref={box}
      class={`dialog at-${props.kind ?? "middle"}`}
      aria-label={props.title}
      onCancel={(event) => {
        event.preventDefault();
        props.onClose();
      }}
      onMouseDown={(event) => event.target === box.current && props.onClose()}
    >
      <div class="dialog-inside">
        <header class="dialog-head">
          <h2>{props.title}</h2>
          <IconButton icon="close" label={t("close")} onClick={props.onClose} />
        </header>
        {props.children}
      </div>
    </dialog>
  );
}

export interface Choice {
  label: string;
  icon?: IconName;
  danger?: boolean;
  run: () => void;
}

/** A button that opens a short list of actions. */
export function Menu({ label, choices }: { label: string; choices: Choice[] }) {
  const [open, setOpen] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  useEffect(() => {
    if (!open) return;
    const items = () => [...box.current!.querySelectorAll<HTMLElement>("[role=menuitem]")];
    items()[0]?.focus();
    const outside = (event: Event) => !box.current!.contains(event.target as Node) && setOpen(false);
    const keys = (event: KeyboardEvent) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        setOpen(false);
        box.current!.querySelector("button")!.focus();
      }
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const all = items();
      const at = all.indexOf(document.activeElement as HTMLElement);
      all[(at + step + all.length) % all.length]?.focus();
    };
    document.addEventListener("pointerdown", outside);
    box.current!.addEventListener("keydown", keys);
    const here = box.current!;
    return () => {
      document.removeEventListener("pointerdown", outside);
      here.removeEventListener("keydown", keys);
    };
  }, [open]);
  return (
    <div class="menu" ref={box}>
      <button
        type="button"
        class="icon-button"
        aria-label={label}
        title={label}
        aria-haspopup="menu"
        aria-expanded={open}
        onClick={(event) => {
          event.stopPropagation();
          setOpen(!open);
        }}
      >
        <Icon name="more" />
      </button>
      {open && (
        <div class="menu-list" role="menu">
          {choices.map((choice) => (
            <button
              key={choice.label}
              type="button"
              role="menuitem"
              class={choice.danger ? "danger" : ""}
              onClick={(event) => {
                event.stopPropagation();
                setOpen(false);
                choice.run();
              }}
            >
              {choice.icon && <Icon name={choice.icon} size={16} />}
              {choice.label}
            </button>
          ))}
        </div>
      )}
    </div>
  );
}

/** An error where it happened: what, the remedy, and the way on. */
export function Trouble({ fault, onRetry }: { fault: unknown; onRetry?: () => void }) {
  const said = fault instanceof Error ? fault.message : String(fault);
  const remedy = fault instanceof Fault ? fault.remedy : "";
  return (
    <div class="trouble" role="alert">
      <Icon name="warning" />
      <div>
        <p>{said}</p>
        {remedy && <p class="soft">{remedy}</p>}
      </div>
      {onRetry && (
        <button type="button" class="button small" onClick={onRetry}>
          {t("retry")}
        </button>
      )}
    </div>
  );
}

const told = signal<{ text: string; id: number; bad: boolean }[]>([]);
let count = 0;

/** A word at the head of the page that goes by itself. */
export function tell(text: string, bad = false): void {
  const id = ++count;
  told.value = [...told.value, { text, id, bad }];
  setTimeout(() => (told.value = told.value.filter((one) => one.id !== id)), bad ? 8000 : 2500);
}

/** For what fails outside of any place of its own. */
export function tellFault(fault: unknown): void {
  const remedy = fault instanceof Fault && fault.remedy ? " " + fault.remedy : "";
  tell((fault instanceof Error ? fault.message : String(fault)) + remedy, true);
}

export function Told() {
  return (
    <div class="told" role="status" aria-live="polite">
      {told.value.map((one) => (
        <div key={one.id} class={one.bad ? "told-one bad" : "told-one"}>
          {one.text}
        </div>
      ))}
    </div>
  );
}

export function Spinner() {
  return <span class="spinner" role="progressbar" aria-label={t("loading")} />;
}
