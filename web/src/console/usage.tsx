// What was used and what it cost: bars by day, and a table by key, model or day.

import { useEffect, useMemo, useState } from "preact/hooks";
import { language, number, short } from "../i18n";
import { consoleWords as t } from "../i18n/console";
import { kept } from "../shell/kept";
import { download, get } from "../shell/api";
import { Icon } from "../shell/icons";
import { Spinner, tellFault, Trouble } from "../shell/ui";
import { Segments } from "../studio/parts";
import { useAsked } from "./asked";
import { Bars, type Part } from "./bars";
import { Money, rounded } from "./money";

interface Sums {
  group: string;
  name: string;
  requests: number;
  hit: number;
  miss: number;
  output: number;
  reasoning: number;
  amount: string;
}

interface Report {
  currency: string;
  rows: Sums[];
  total: Sums;
}

const SPANS = ["7", "30", "90"] as const;
const GROUPS = ["day", "model", "key"] as const;
const MEASURES = ["amount", "tokens", "requests"] as const;
type Measure = (typeof MEASURES)[number];

const span = kept<(typeof SPANS)[number]>("qiusuo.console.days", "30");
const by = kept<(typeof GROUPS)[number]>("qiusuo.console.by", "model");
const measure = kept<Measure>("qiusuo.console.measure", "amount");

const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;

export function Usage() {
  const days = useMemo(() => lastDays(Number(span.value)), [span.value]);
  const query = `from=${days[0]}&to=${days.at(-1)}&timezone=${encodeURIComponent(zone)}`;
  const { value: report, fault, again } = useAsked<Report>(`api/console/usage?by=${by.value}&${query}`);
  // Where nothing costs anything, money tells nothing.
  const free = report !== null && Number(report.total.amount) === 0;
  const shown = free && measure.value === "amount" ? "tokens" : measure.value;
  return (
    <>
      <div class="co-tools">
        <Segments label={t("days")} values={SPANS} chosen={span.value} name={(one) => t(`days_${one}`)} choose={(one) => (span.value = one)} />
        <Segments label={t("measure")} values={free ? MEASURES.slice(1) : MEASURES} chosen={shown} name={(one) => t(`measure_${one}`)} choose={(one) => (measure.value = one)} />
      </div>
      {fault !== null && <Trouble fault={fault} onRetry={again} />}
      {report === null && fault === null && <Spinner />}
      {report && report.total.requests > 0 && <DayBars days={days} measure={shown} currency={report.currency} />}
      {report && (
        <section class="stack">
          <div class="co-tools">
            <Segments label={t("by")} values={GROUPS} chosen={by.value} name={(one) => t(`by_${one}`)} choose={(one) => (by.value = one)} />
            <button
              type="button"
              class="button small co-last"
              onClick={() => download(`api/console/usage?by=${by.value}&${query}&format=csv`, `usage-by-${by.value}.csv`).catch(tellFault)}
            >
              <Icon name="download" size={15} />
              {t("csv")}
            </button>
          </div>
          {report.total.requests === 0 ? <p class="soft">{t("noUsage")}</p> : <UsageTable report={report} />}
        </section>
      )}
    </>
  );
}

/** The days up to today, as the browser's calendar has them: 2026-11-22. */
function lastDays(count: number): string[] {
  const today = new Date();
  return Array.from({ length: count }, (_, i) => {
    const day = new Date(today.getFullYear(), today.getMonth(), today.getDate() - (count - 1 - i));
    return `${day.getFullYear()}-${String(day.getMonth() + 1).padStart(2, "0")}-${String(day.getDate()).padStart(2, "0")}`;
  });
}

function dayTold(day: string): string {
  const [year, month, date] = day.split("-").map(Number);
  return new Date(year!, month! - 1, date).toLocaleDateString(language.value === "zh" ? "zh-CN" : "en", { month: "short", day: "numeric" });
}

const valueOf = (sums: Sums, measure: Measure) =>
  measure === "amount" ? Number(sums.amount) : measure === "requests" ? sums.requests : sums.hit + sums.miss + sums.output;

const MOST_PARTS = 7;

function DayBars({ days, measure, currency }: { days: string[]; measure: Measure; currency: string }) {
  const [byDay, setByDay] = useState<Map<string, Sums[]> | null>(null);
  useEffect(() => {
    const over = new AbortController();
    modelsOfDays(days, over.signal).then(setByDay, (reason) => over.signal.aborted || tellFault(reason));
    return () => over.abort();
  }, [days]);
  const parts = useMemo(() => (byDay ? partsOf(days, byDay, measure) : null), [byDay, measure, language.value]);
  if (!parts) return <Spinner />;
  const told = (value: number) => (measure === "amount" ? `${rounded(String(value))} ${currency}` : short(value));
  return <Bars title={t("perDay", { what: t(`measure_${measure}`) })} days={days} parts={parts} told={told} dayTold={dayTold} />;
}

/** A report has one dimension: so the models of each day on which anything was asked. */
async function modelsOfDays(days: string[], signal: AbortSignal): Promise<Map<string, Sums[]>> {
  const query = (by: string, from: string, to: string) =>
    get<Report>(`api/console/usage?by=${by}&from=${from}&to=${to}&timezone=${encodeURIComponent(zone)}`, signal);
  const all = await query("day", days[0]!, days.at(-1)!);
  const busy = all.rows.filter((row) => row.requests > 0).map((row) => row.group);
  return new Map(await Promise.all(busy.map(async (day) => [day, (await query("model", day, day)).rows] as const)));
}

/** The largest models one by one, the others together. */
function partsOf(days: string[], byDay: Map<string, Sums[]>, measure: Measure): Part[] {
  const sums = new Map<string, number>();
  for (const rows of byDay.values()) for (const row of rows) sums.set(row.group, (sums.get(row.group) ?? 0) + valueOf(row, measure));
  const models = [...sums].sort((a, b) => b[1] - a[1]).map(([model]) => model);
  const named = models.slice(0, models.length > MOST_PARTS + 1 ? MOST_PARTS : models.length);
  const of = (day: string, wanted: (model: string) => boolean) =>
    (byDay.get(day) ?? []).filter((row) => wanted(row.group)).reduce((sum, row) => sum + valueOf(row, measure), 0);
  const parts = named.map((model, colour) => ({ label: model, colour, values: days.map((day) => of(day, (one) => one === model)) }));
  if (named.length < models.length) {
    parts.push({ label: t("otherModels"), colour: MOST_PARTS, values: days.map((day) => of(day, (one) => !named.includes(one))) });
  }
  return parts;
}

function UsageTable({ report }: { report: Report }) {
  const name = (row: Sums) => (by.value === "day" ? dayTold(row.group) : by.value === "key" ? row.name || (row.group || t("local")) : row.group);
  const cells = (row: Sums) => (
    <>
      <td data-label={t("requests")} class="right">{number(row.requests)}</td>
      <td data-label={t("hitTokens")} class="right">{number(row.hit)}</td>
      <td data-label={t("missTokens")} class="right">{number(row.miss)}</td>
      <td data-label={t("outputTokens")} class="right">{number(row.output)}</td>
      <td data-label={t("reasoningTokens")} class="right">{number(row.reasoning)}</td>
      <td data-label={t("spent")} class="right"><Money amount={row.amount} currency={report.currency} /></td>
    </>
  );
  const rows = by.value === "day" ? [...report.rows].reverse() : report.rows;
  return (
    <div class="co-wide">
      <table class="table co-cards">
        <thead>
          <tr>
            <th scope="col">{t(`by_${by.value}`)}</th>
            {(["requests", "hitTokens", "missTokens", "outputTokens", "reasoningTokens", "spent"] as const).map((key) => (
              <th scope="col" class="right" key={key}>
                {t(key)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row) => (
            <tr key={row.group}>
              <th scope="row">{name(row)}</th>
              {cells(row)}
            </tr>
          ))}
        </tbody>
        <tfoot>
          <tr>
            <th scope="row">{t("total")}</th>
            {cells(report.total)}
          </tr>
        </tfoot>
      </table>
    </div>
  );
}
