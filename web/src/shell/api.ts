// The one way to the server: adds the key, turns every failure into a Fault that says what to do,
// and reads event streams by fetch, because EventSource can send neither a key nor a body.
import { signal } from "@preact/signals";
import { shellWords as t } from "../i18n/shell";

const STORE = "qiusuo.key";
/** True while the server wants a key that we do not have. */
export const keyWanted = signal(false);
/** Counts the keys given, so that what failed for want of one can be asked for again. */
export const keyGiven = signal(0);

export function key(): string {
  return sessionStorage.getItem(STORE) ?? "";
}

export function giveKey(text: string): void {
  if (text) sessionStorage.setItem(STORE, text);
  else sessionStorage.removeItem(STORE);
  keyWanted.value = false;
  keyGiven.value += 1;
}

/** A request that failed. `status` 0: the server was not reached. */
export class Fault extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string = "",
  ) {
    super(message);
  }

  /** What the person can do, in their language; empty when the message says it all. */
  get remedy(): string {
    if (this.status === 0) return t("remedyOffline");
    if (this.status === 401) return t("remedyKey");
    if (this.status === 402) return t("remedyBalance");
    if (this.status === 429) return t("remedyRate");
    if (this.status === 503) return t("remedyBusy");
    if (this.status >= 500) return t("remedyServer");
    return "";
  }
}

export interface Asking {
  method?: "GET" | "POST" | "PATCH" | "PUT" | "DELETE";
  body?: unknown;
  signal?: AbortSignal;
  /** Goes on after the page is closed (small bodies only). */
  keepalive?: boolean;
}

/** Sends a request and returns the answer when it is a good one. Paths begin without a slash. */
export async function send(path: string, asking: Asking = {}): Promise<Response> {
  const headers: Record<string, string> = {};
  if (key()) headers.authorization = "Bearer " + key();
  if (asking.body !== undefined) headers["content-type"] = "application/json";
  let answer: Response;
  try {
    answer = await fetch("/" + path, {
      method: asking.method ?? "GET",
      headers,
      body: asking.body === undefined ? undefined : JSON.stringify(asking.body),
      signal: asking.signal,
      keepalive: asking.keepalive,
      cache: "no-store",
    });
  } catch (fault) {
    if (asking.signal?.aborted) throw fault;
    throw new Fault(0, t("offline"));
  }
  if (answer.ok) return answer;
  if (answer.status === 401) keyWanted.value = true;
  throw await faultOf(answer);
}

async function faultOf(answer: Response): Promise<Fault> {
  const text = await answer.text().catch(() => "");
  try {
    const body = JSON.parse(text);
    const error = body.error ?? body;
    const said = error.message ?? (typeof body.detail === "string" ? body.detail : text);
    return new Fault(answer.status, String(said), String(error.code ?? ""));
  } catch {
    return new Fault(answer.status, text.slice(0, 300) || `${answer.status} ${answer.statusText}`);
  }
}

/** Sends and reads JSON; undefined where the answer has no body (204). */
export async function ask<T>(path: string, asking: Asking = {}): Promise<T> {
  const answer = await send(path, asking);
  const text = await answer.text();
  return (text ? JSON.parse(text) : undefined) as T;
}

export const get = <T>(path: string, signal?: AbortSignal) => ask<T>(path, { signal });
export const post = <T>(path: string, body: unknown = {}) => ask<T>(path, { method: "POST", body });
export const patch = <T>(path: string, body: unknown) => ask<T>(path, { method: "PATCH", body });
export const put = <T>(path: string, body: unknown) => ask<T>(path, { method: "PUT", body });
export const remove = <T>(path: string) => ask<T>(path, { method: "DELETE" });

export interface ServerEvent {
  event: string;
  data: string;
  id: string;
}

/** The events of an answer as they come. Ends with the stream; a broken one raises a Fault(0). */
export async function* eventsOf(answer: Response, signal?: AbortSignal): AsyncGenerator<ServerEvent> {
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let open: ServerEvent = { event: "message", data: "", id: "" };
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop()!;
      for (const line of lines) {
        if (line === "") {
          if (open.data) yield { ...open, data: open.data.slice(0, -1) };
          open = { event: "message", data: "", id: open.id };
        } else if (!line.startsWith(":")) {
          const colon = line.indexOf(":");
          const name = colon < 0 ? line : line.slice(0, colon);
          const text = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
          if (name === "data") open.data += text + "\n";
          else if (name === "event") open.event = text;
          else if (name === "id") open.id = text;
        }
      }
    }
  } catch (fault) {
    if (signal?.aborted) throw fault;
    throw new Fault(0, t("broken"));
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

/** Asks for an event stream and reads it. */
export async function* events(path: string, asking: Asking = {}): AsyncGenerator<ServerEvent> {
  yield* eventsOf(await send(path, asking), asking.signal);
}

/** Hands a file to the person (exports, CSV), with the key that a plain link could not send. */
export async function download(path: string, name: string): Promise<void> {
  const answer = await send(path);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
