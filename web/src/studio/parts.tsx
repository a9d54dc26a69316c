// Small parts that Studio and Console share.

import { useEffect, useRef } from "preact/hooks";

interface TabsProps<T extends string> {
  tabs: readonly T[];
  shown: T;
  name: (tab: T) => string;
  choose: (tab: T) => void;
}

/** A row of tabs for the panel with the id "st-panel"; the arrow keys go from one to the next. */
export function Tabs<T extends string>({ tabs, shown, name, choose }: TabsProps<T>) {
  const row = useRef<HTMLDivElement>(null);
  const move = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = tabs[(tabs.indexOf(shown) + by + tabs.length) % tabs.length]!;
    choose(next);
    row.current!.querySelector<HTMLElement>(`#st-tab-${next}`)!.focus();
  };
  useEffect(() => {
    row.current!.querySelector(`#st-tab-${shown}`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }, [shown]);
  return (
    <div class="st-tabs" role="tablist" ref={row} onKeyDown={move}>
      {tabs.map((tab) => (
        <button
          key={tab}
          id={`st-tab-${tab}`}
          type="button"
          role="tab"
          aria-selected={tab === shown}
          aria-controls="st-panel"
          tabIndex={tab === shown ? 0 : -1}
          onClick={() => choose(tab)}
        >
          {name(tab)}
        </button>
      ))}
    </div>
  );
}

interface SegmentsProps<T extends string> {
  label: string;
  values: readonly T[];
  chosen: T;
  name: (value: T) => string;
  choose: (value: T) => void;
  /** The label is read aloud only. */
  hidden?: boolean;
}

/** One of a few, all of them in sight. */
export function Segments<T extends string>({ label, values, chosen, name, choose, hidden }: SegmentsProps<T>) {
  return (
    <div class="st-tool" role="group" aria-label={label}>
      {!hidden && <span>{label}</span>}
      <div class="st-segments">
        {values.map((value) => (
          <button key={value} type="button" aria-pressed={value === chosen} onClick={() => choose(value)}>
            {name(value)}
          </button>
        ))}
      </div>
    </div>
  );
}
