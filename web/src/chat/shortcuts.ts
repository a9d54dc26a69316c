import { useEffect, useRef } from "preact/hooks";

interface Actions {
  onSearch: () => void;
  onNew: () => void;
  onEscape: () => void;
  onHelp: () => void;
}

export function useShortcuts(actions: Actions): void {
  const latest = useRef(actions);
  latest.current = actions;
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.isComposing || event.defaultPrevented) return;
      const { onSearch, onNew, onEscape, onHelp } = latest.current;
      const target = event.target as HTMLElement;
      const typing = target.matches?.("input, textarea, select") || target.isContentEditable;
      const mod = event.ctrlKey || event.metaKey;
      const pressed = event.key.toLowerCase();
      if (document.querySelector("dialog[open]")) return;
      if (mod && pressed === "k") onSearch();
      else if (mod && event.shiftKey && pressed === "o") onNew();
      else if (event.key === "Escape") onEscape();
      else if (typing || mod || event.altKey) return;
      else if (event.key === "?") onHelp();
      else if (event.key === "/") document.getElementById("composer")?.focus();
      else return;
      event.preventDefault();
    };
    document.addEventListener("keydown", onKey);
    return () => document.removeEventListener("keydown", onKey);
  }, []);
}
