// Where one is: /, /?c=CONVERSATION, /studio, /studio/RUN, /console, /console?s=SECTION. The server
// answers each of them with the same page.
import { signal } from "@preact/signals";

export interface Place {
  area: "chat" | "studio" | "console";
  /** The conversation, the run, or the console's section. */
  id: string | null;
}

/** A stray % is itself: whatever an address says, the page comes up. */
function decoded(word: string): string {
  try {
    return decodeURIComponent(word);
  } catch {
    return word;
  }
}

function read(): Place {
  const [, area, ...rest] = location.pathname.split("/").map(decoded);
  const query = new URLSearchParams(location.search);
  if (area === "studio") return { area, id: rest.join("/") || null };
  if (area === "console") return { area, id: query.get("s") };
  return { area: "chat", id: query.get("c") };
}

export const place = signal<Place>(read());
const settle = () => (place.value = read());
addEventListener("popstate", settle);

export function address(area: Place["area"], id?: string | null): string {
  if (area === "studio") return "/studio" + (id ? "/" + encodeURIComponent(id) : "");
  if (area === "console") return "/console" + (id ? "?s=" + encodeURIComponent(id) : "");
  return "/" + (id ? "?c=" + encodeURIComponent(id) : "");
}

/** Goes there; `quietly` leaves no step behind in the browser's history. */
export function go(area: Place["area"], id?: string | null, quietly = false): void {
  const to = address(area, id);
  if (quietly) history.replaceState(null, "", to);
  else if (to !== location.pathname + location.search) history.pushState(null, "", to);
  settle();
}

// Plain links between places stay within the page; with a modifier they open as links do.
addEventListener("click", (event) => {
  const link = (event.target as Element).closest?.("a");
  if (!link || event.defaultPrevented || event.button || link.target || link.hasAttribute("download"))
    return;
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  if (link.origin !== location.origin || !/^\/($|studio(\/|$)|console$)/.test(link.pathname)) return;
  if (link.getAttribute("href")?.startsWith("#")) return;
  event.preventDefault();
  history.pushState(null, "", link.pathname + link.search);
  settle();
});
