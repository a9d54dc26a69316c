// What an answer took that was gone on with: both parts together.
import type { Usage } from "./types";

export function addUsage(before: Usage | null | undefined, now: Usage): Usage {
  if (!before) return now;
  const thought = (one: Usage) => one.completion_tokens_details?.reasoning_tokens ?? 0;
  return {
    ...now, // the prompt is the later one's
    completion_tokens: before.completion_tokens + now.completion_tokens,
    completion_tokens_details: { reasoning_tokens: thought(before) + thought(now) },
  };
}

/** "0.25 CNY" + "0.5 CNY" = "0.75 CNY", exactly. */
export function addCost(before: string | null | undefined, now: string): string {
  if (!before) return now;
  const [one, currency] = before.split(" ") as [string, string];
  const [other] = now.split(" ") as [string];
  const places = Math.max(...[one, other].map((text) => text.split(".")[1]?.length ?? 0));
  const whole = (text: string) => {
    const [units = "0", rest = ""] = text.split(".");
    return BigInt(units + rest.padEnd(places, "0"));
  };
  const sum = String(whole(one) + whole(other)).padStart(places + 1, "0");
  return `${places ? `${sum.slice(0, -places)}.${sum.slice(-places)}` : sum} ${currency}`;
}
