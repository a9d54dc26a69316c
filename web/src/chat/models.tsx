// The model picker: a name that opens a list with what one needs to choose.
import { useEffect, useRef, useState } from "preact/hooks";
import { short } from "../i18n";
import { Icon } from "../shell/icons";
import { models, refresh } from "../shell/server";
import type { Model } from "../shell/types";
import type { Thread } from "./thread";
import { chatWords as t } from "./words";

function Details({ model }: { model: Model }) {
  const { price } = model;
  return (
    <>
      <span class="row model-facts">
        <span>{t("parameters", { n: short(model.parameters) })}</span>
        <span>{t("context", { n: short(model.context) })}</span>
        {model.thinks && <span class="badge accent">{t("thinks")}</span>}
        {model.tools && <span class="badge">{t("usesTools")}</span>}
        {model.kind === "text" && <span class="badge">{t("textOnly")}</span>}
      </span>
      {price && <span class="model-price">{t("priceOf", { ...price })}</span>}
    </>
  );
}

export function ModelPicker({ thread }: { thread: Thread }) {
  const [open, setOpen] = useState(false);
  const box = useRef<HTMLDivElement>(null);
  const model = thread.model.value;
  useEffect(() => {
    if (!open) return;
    void refresh(); // a model may have been loaded since
    const here = box.current!;
    here.querySelector<HTMLElement>("[aria-selected=true]")?.focus();
    const outside = (event: Event) => !here.contains(event.target as Node) && setOpen(false);
    document.addEventListener("pointerdown", outside);
    return () => document.removeEventListener("pointerdown", outside);
  }, [open]);
  const onKeyDown = (event: KeyboardEvent) => {
    if (!open) return;
    const all = [...box.current!.querySelectorAll<HTMLElement>("[role=option]")];
    const at = all.indexOf(document.activeElement as HTMLElement);
    if (event.key === "Escape") {
      event.stopPropagation();
      setOpen(false);
      box.current!.querySelector("button")!.focus();
    } else if (event.key === "ArrowDown") all[Math.min(at + 1, all.length - 1)]?.focus();
    else if (event.key === "ArrowUp") all[Math.max(at - 1, 0)]?.focus();
    else return;
    event.preventDefault();
  };
  if (!models.value?.length) return null;
  return (
    <div class="picker" ref={box} onKeyDown={onKeyDown}>
      <button
        type="button"
        class="picker-button"
        aria-haspopup="listbox"
        aria-expanded={open}
        aria-label={`${t("model")}: ${model?.id ?? ""}`}
        onClick={() => setOpen(!open)}
      >
        <span>{model?.id}</span>
        <Icon name="down" size={15} />
      </button>
      {open && (
        <div class="picker-list" role="listbox" aria-label={t("chooseModel")}>
          {models.value.map((one) => (
            <button
              key={one.id}
              type="button"
              role="option"
              aria-selected={one.id === model?.id}
              onClick={() => {
                void thread.set({ model: one.id });
                setOpen(false);
                document.getElementById("composer")?.focus();
              }}
            >
              <span class="row model-name">
                {one.id}
                {one.id === model?.id && <Icon name="check" size={16} />}
              </span>
              <Details model={one} />
            </button>
          ))}
        </div>
      )}
    </div>
  );
}
