// What every area wants to know of the server: who we are, which models there are.
import { signal } from "@preact/signals";
import { Fault, get } from "./api";
import type { Me, Model } from "./types";

export const me = signal<Me | null>(null);
export const models = signal<Model[] | null>(null);
/** Why the server could not be asked, if it could not. */
export const unreached = signal<Fault | null>(null);

/** Asks again; call it after a model was loaded or taken away, and after the key changed. */
export async function refresh(): Promise<void> {
  try {
    me.value = await get<Me>("api/me");
    models.value = await get<Model[]>("api/models");
    unreached.value = null;
  } catch (fault) {
    unreached.value = fault as Fault;
  }
}
