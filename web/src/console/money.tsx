// Amounts come as exact decimals in text, and are shown so: what is rounded for the eye tells the
// exact amount when one points at it.

import { language } from "../i18n";

/** About three digits, two places at least: "0.000023" stays, "12.5" becomes "12.50". */
export function rounded(amount: string): string {
  const size = Math.abs(Number(amount));
  return Number(amount).toLocaleString(language.value === "zh" ? "zh-CN" : "en", {
    minimumFractionDigits: 2,
    maximumFractionDigits: size >= 1 || size === 0 ? 2 : size >= 0.01 ? 4 : 6,
  });
}

export function Money({ amount, currency }: { amount: string; currency?: string }) {
  return (
    <span class="numbers" title={`${amount}${currency ? " " + currency : ""}`}>
      {rounded(amount)}
      {currency && <small class="faint"> {currency}</small>}
    </span>
  );
}
