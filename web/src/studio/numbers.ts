// Numbers as a chart or a table shows them: few digits, one width, in the reader's language.

import { duration, language, number, short } from "../i18n";

/** About four digits that matter: 0.000103 → "1.03e-4", 3.6157 → "3.616", 12345 → "12,345". */
export function figure(value: number | null | undefined): string {
  if (value == null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2);
  if (size >= 1e7) return short(value);
  if (size >= 1000) return number(value);
  if (size < 0.1) return String(Number(value.toPrecision(4)));
  const places = Math.max(0, 3 - Math.floor(Math.log10(size)));
  return number(value, places);
}

/** What stands at an axis: as short as it can be and still exact. */
export function tick(value: number, digits = 4): string {
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential().replace("e+", "e");
  if (size >= 1000) {
    const [unit, letter] = size >= 1e9 ? [1e9, "G"] : size >= 1e6 ? [1e6, "M"] : [1e3, "k"];
    return `${Number((value / unit).toPrecision(digits))}${letter}`;
  }
  return String(Number(value.toPrecision(digits)));
}

/** All at one axis, with as many places as tell neighbours apart. */
export function ticks(values: (number | null)[]): string[] {
  for (const digits of [4, 6, 8, 12]) {
    const told = values.map((value) => (value === null ? "" : tick(value, digits)));
    if (new Set(told).size === told.length || digits === 12) return told;
  }
  return [];
}

/** A count at an axis, of steps or of tokens: whole, and with a letter only where it is long. */
export function stepTick(value: number): string {
  return Math.abs(value) < 1e5 ? number(Math.round(value)) : tick(value);
}

/** Seconds at an axis: "40s", "5m", "1h30". */
export function clockTick(seconds: number): string {
  if (seconds < 60) return `${Number(seconds.toPrecision(3))}s`;
  const minutes = seconds / 60;
  if (minutes < 60) return `${Number(minutes.toPrecision(3))}m`;
  const whole = Math.round(minutes);
  const rest = whole % 60;
  return `${Math.floor(whole / 60)}h${rest ? String(rest).padStart(2, "0") : ""}`;
}

/** A time to go, only as exact as a guess is. */
export function roughly(seconds: number): string {
  return duration(seconds < 60 ? Math.max(10, Math.ceil(seconds / 10) * 10) : seconds);
}

/** The date and time in full, for a title or a table. */
export function exactly(when: number): string {
  const date = new Date(when);
  return date.toLocaleString(language.value === "zh" ? "zh-CN" : "en", { dateStyle: "medium", timeStyle: "short" });
}
