// Smoothing that does not lag: a centred mean, so a falling curve stays on its points.

import type { Column } from "./records";

/**
 * Three centred box means after one another, which is close to a Gaussian and takes the same time
 * however wide it is. `strength` from 0 (nothing) to 1 (a tenth of all points on each side).
 * Values that are not numbers are passed over.
 */
export function smooth(values: Column, strength: number): Column {
  const reach = Math.round((strength ** 2 * values.length) / 10);
  if (reach < 1) return values; // too few to hide anything
  let result = values;
  for (let pass = 0; pass < 3; pass++) result = boxMean(result, Math.max(1, Math.round(reach / 2)));
  return result;
}

function boxMean(values: Column, reach: number): Column {
  const n = values.length;
  const sums = new Float64Array(n + 1);
  const counts = new Uint32Array(n + 1);
  for (let i = 0; i < n; i++) {
    const value = values[i] ?? null;
    sums[i + 1] = sums[i]! + (value ?? 0);
    counts[i + 1] = counts[i]! + (value === null ? 0 : 1);
  }
  const means: Column = new Array(n);
  for (let i = 0; i < n; i++) {
    // Near an end the window shrinks on both sides alike, or the mean would lean inwards.
    const wide = Math.min(reach, i, n - 1 - i);
    const [from, to] = [i - wide, i + wide + 1];
    const count = counts[to]! - counts[from]!;
    means[i] = count ? (sums[to]! - sums[from]!) / count : null;
  }
  return means;
}
