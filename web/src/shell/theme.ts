// Light and dark: what the system prefers, unless the person chose.
import { effect, signal } from "@preact/signals";
import { kept } from "./kept";

export type Theme = "system" | "light" | "dark";

export const theme = kept<Theme>("qiusuo.theme", "system");
const systemDark = matchMedia("(prefers-color-scheme: dark)");
/** Whether the page is dark now; charts redraw when it changes. */
export const dark = signal(systemDark.matches);

export function applyTheme(): void {
  const settle = () => {
    dark.value = theme.value === "system" ? systemDark.matches : theme.value === "dark";
    document.documentElement.dataset.theme = dark.value ? "dark" : "light";
  };
  systemDark.addEventListener("change", settle);
  effect(settle);
}
