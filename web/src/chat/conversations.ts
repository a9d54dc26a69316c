// The list at the left: what the server keeps, newest first, and what a search finds.
import { signal } from "@preact/signals";
import { download, get, patch, post, remove } from "../shell/api";
import { tellFault } from "../shell/ui";
import type { Conversation, Settings, Summary } from "./types";
import { chatWords as t } from "./words";

const PAGE = 40;

export const list = signal<Summary[] | null>(null);
export const searched = signal("");
export const more = signal(false);
export const listFault = signal<unknown>(null);

let asked = 0;

/** Asks for the list anew; an older answer that comes late is passed over. */
export async function load(before?: Summary): Promise<void> {
  const turn = ++asked;
  const query = new URLSearchParams({ limit: String(PAGE) });
  if (searched.value) query.set("q", searched.value);
  if (before) query.set("before", String(before.updated));
  try {
    const found = await get<Summary[]>("api/conversations?" + query);
    if (turn !== asked) return;
    list.value = before ? [...(list.value ?? []), ...found] : found;
    more.value = found.length === PAGE;
    listFault.value = null;
  } catch (fault) {
    if (turn === asked) listFault.value = fault;
  }
}

let pause = 0;
export function search(text: string): void {
  searched.value = text;
  clearTimeout(pause);
  pause = window.setTimeout(load, 180);
}

const place = (id: string) => `api/conversations/${encodeURIComponent(id)}`;

export function make(
  title: string,
  model: string,
  system: string,
  settings: Settings,
): Promise<Conversation> {
  return post("api/conversations", { title, model, system, settings });
}

export const read = (id: string) => get<Conversation>(place(id));
export const change = (id: string, part: Partial<Conversation>) => patch(place(id), part);

export async function rename(id: string, title: string): Promise<void> {
  list.value = list.value?.map((one) => (one.id === id ? { ...one, title } : one)) ?? null;
  await change(id, { title }).catch(tellFault);
}

export async function drop(id: string): Promise<boolean> {
  try {
    await remove(place(id));
  } catch (fault) {
    tellFault(fault);
    return false;
  }
  list.value = list.value?.filter((one) => one.id !== id) ?? null;
  return true;
}

export function exported(one: Summary, format: "md" | "json"): void {
  const name = (one.title || t("untitled")).replace(/[\\/:*?"<>|\s]+/g, " ").trim().slice(0, 60);
  download(`${place(one.id)}/export?format=${format}`, `${name}.${format}`).catch(tellFault);
}

/** A conversation's name from its first words. */
export function titleOf(text: string): string {
  const line = text.trim().split("\n").find((one) => one.trim()) ?? "";
  const letters = [...line.trim()];
  return letters.length > 60 ? letters.slice(0, 59).join("") + "…" : letters.join("");
}
