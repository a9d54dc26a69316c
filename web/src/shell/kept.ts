// A signal whose value outlives the page: preferences of this browser, nothing secret.
import { effect, signal, type Signal } from "@preact/signals";

export function kept<T>(name: string, otherwise: T): Signal<T> {
  let first = otherwise;
  try {
    const text = localStorage.getItem(name);
    if (text !== null) first = JSON.parse(text) as T;
  } catch {
    // a blocked or spoilt store is no reason not to show the page
  }
  const value = signal(first);
  let begun = false;
  effect(() => {
    const text = JSON.stringify(value.value);
    // What nobody chose is not kept: the default may follow the system.
    if (!begun) return void (begun = true);
    try {
      localStorage.setItem(name, text);
    } catch {
      // private windows may refuse
    }
  });
  return value;
}
