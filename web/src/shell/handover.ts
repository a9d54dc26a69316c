// From Studio to Chat: open an empty conversation with this model, and perhaps these words.
import { signal } from "@preact/signals";
import { go } from "./router";

export interface Handover {
  model: string;
  prompt?: string;
}

export const handover = signal<Handover | null>(null);

export function startChat(wish: Handover): void {
  handover.value = wish;
  go("chat");
}
