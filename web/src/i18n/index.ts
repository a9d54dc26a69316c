// The page's words. Each area has a dictionary of its own; the type of the English one is what the
// Chinese one must have, so that a word cannot be forgotten.
import { effect } from "@preact/signals";
import { kept } from "../shell/kept";

export type Language = "en" | "zh";

const preferred: Language = navigator.languages.find((tag) => /^(zh|en)\b/i.test(tag))?.startsWith("zh")
  ? "zh"
  : "en";
export const language = kept<Language>("qiusuo.language", preferred);
effect(() => {
  document.documentElement.lang = language.value === "zh" ? "zh-CN" : "en";
});

type Values = Record<string, string | number>;

/** Makes `t("key", {n: 3})`; `{n}` in a text is replaced. Reading it in a component follows the switch. */
export function dictionary<K extends string>(en: Record<K, string>, zh: Record<K, string>) {
  return (key: K, values: Values = {}): string => {
    const text = (language.value === "zh" ? zh : en)[key];
    return text.replace(/\{(\w+)\}/g, (whole, name: string) =>
      name in values ? String(values[name]) : whole,
    );
  };
}

const locale = () => (language.value === "zh" ? "zh-CN" : "en");

/** 12345.6 -> "12,346" or, with places, "12,345.60". */
export function number(value: number, places = 0): string {
  return value.toLocaleString(locale(), {
    minimumFractionDigits: places,
    maximumFractionDigits: places,
  });
}

/** 135_000_000 -> "135M" ("1.35亿" in Chinese). */
export function short(value: number): string {
  return value.toLocaleString(locale(), { notation: "compact", maximumSignificantDigits: 3 });
}

/** Seconds as a person says them: "35 ms", "0.4 s", "12 s", "3 min 20 s", "2 h 5 min". */
export function duration(seconds: number): string {
  const zh = language.value === "zh";
  const [ms, s, min, h] = zh ? [" 毫秒", " 秒", " 分", " 小时"] : [" ms", " s", " min", " h"];
  if (seconds < 0.0995) return Math.round(seconds * 1000) + ms;
  if (seconds < 9.95) return seconds.toFixed(1) + s;
  const whole = Math.round(seconds);
  if (whole < 60) return whole + s;
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return minutes + min + (whole % 60 ? " " + (whole % 60) + s : "");
  return Math.floor(minutes / 60) + h + (minutes % 60 ? " " + (minutes % 60) + min : "");
}

/** A moment: the time today, the date otherwise. */
export function moment(when: string | number | Date): string {
  const date = new Date(when);
  const today = new Date().toDateString() === date.toDateString();
  return today
    ? date.toLocaleTimeString(locale(), { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString(locale(), {
        month: "short",
        day: "numeric",
        ...(date.getFullYear() === new Date().getFullYear() ? {} : { year: "numeric" }),
      });
}
