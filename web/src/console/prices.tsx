// The price book: for a million tokens of each kind, with the hours at which prices are others.

import { useState } from "preact/hooks";
import { consoleWords as t } from "../i18n/console";
import { shellWords } from "../i18n/shell";
import { put } from "../shell/api";
import { Icon } from "../shell/icons";
import { me, models, refresh } from "../shell/server";
import { Dialog, IconButton, Spinner, Trouble } from "../shell/ui";
import { exactly } from "../studio/numbers";
import { useAsked } from "./asked";

const DAYS = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"] as const;
type Day = (typeof DAYS)[number];

interface Hours {
  start: string;
  end: string;
  factor: string;
  timezone: string;
  weekdays: Day[];
  excluded: string[];
}

interface PriceList {
  model: string;
  hit: string;
  miss: string;
  output: string;
  windows: Hours[];
  /** Seconds since 1970. */
  from: number;
}

interface Book {
  currency: string;
  prices: PriceList[];
  follow: PriceList[];
}

const KINDS = ["hit", "miss", "output"] as const;
/** The model of this name stands for all that have no list of their own. */
const OTHERS = "*";

export function Prices() {
  const { value: book, fault, again } = useAsked<Book>("api/console/prices");
  const [edited, setEdited] = useState<PriceList | null>(null);
  if (book === null) return fault === null ? <Spinner /> : <Trouble fault={fault} onRetry={again} />;
  const empty: PriceList = { model: "", hit: "", miss: "", output: "", windows: [], from: 0 };
  return (
    <>
      {me.value?.admin && (
        <div class="row end">
          <button type="button" class="button primary" onClick={() => setEdited(empty)}>
            <Icon name="plus" size={16} />
            {t("setPrice")}
          </button>
        </div>
      )}
      {book.prices.length === 0 ? <p class="soft">{t("noPrices")}</p> : <PriceTable book={book} lists={book.prices} onEdit={setEdited} />}
      {book.follow.length > 0 && (
        <section class="stack">
          <h2>{t("follow")}</h2>
          <PriceTable book={book} lists={book.follow} />
        </section>
      )}
      {edited && (
        <PriceForm
          old={edited}
          book={book}
          onClose={() => setEdited(null)}
          onDone={() => {
            setEdited(null);
            again();
            void refresh();
          }}
        />
      )}
    </>
  );
}

function PriceTable({ book, lists, onEdit }: { book: Book; lists: PriceList[]; onEdit?: (list: PriceList) => void }) {
  const change = onEdit && me.value?.admin;
  return (
    <div class="co-wide">
      <table class="table co-cards">
        <caption class="small-text faint">{t("perMillion", { currency: book.currency })}</caption>
        <thead>
          <tr>
            <th scope="col">{t("model")}</th>
            {KINDS.map((kind) => (
              <th scope="col" key={kind} class="right">
                {t(kind)}
              </th>
            ))}
            <th scope="col">{t("peak")}</th>
            <th scope="col">{t("beginsShort")}</th>
            {change && (
              <th scope="col">
                <span class="unseen">{t("actions")}</span>
              </th>
            )}
          </tr>
        </thead>
        <tbody>
          {lists.map((list) => (
            <tr key={list.model + list.from}>
              <th scope="row">{list.model === OTHERS ? t("everyOther") : list.model}</th>
              {KINDS.map((kind) => (
                <td key={kind} data-label={t(kind)} class="right numbers">
                  {list[kind]}
                </td>
              ))}
              <td data-label={t("peak")}>
                <div>{list.windows.length === 0 ? "–" : list.windows.map((hours, i) => <div key={i}>{hoursTold(hours)}</div>)}</div>
              </td>
              <td data-label={t("beginsShort")}>{exactly(list.from * 1000)}</td>
              {change && (
                <td class="right co-actions">
                  <button type="button" class="button small" onClick={() => onEdit(list)}>
                    {t("change")}
                  </button>
                </td>
              )}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** "Mon–Fri 09:00–12:00 ×2 (Asia/Shanghai)" */
function hoursTold({ start, end, factor, timezone, weekdays }: Hours): string {
  const places = DAYS.map((day) => weekdays.includes(day));
  const runs: string[] = [];
  for (let i = 0; i < 7; i++) {
    if (!places[i]) continue;
    let j = i;
    while (places[j + 1]) j++;
    runs.push(i === j ? t(DAYS[i]!) : `${t(DAYS[i]!)}–${t(DAYS[j]!)}`);
    i = j;
  }
  return `${runs.join(", ")} ${start}–${end} ×${factor} (${timezone})`;
}

const WORKDAYS: Day[] = ["mon", "tue", "wed", "thu", "fri"];
const hoursFrom = (start: string, end: string): Hours => ({ start, end, factor: "2", timezone: "Asia/Shanghai", weekdays: WORKDAYS, excluded: [] });

interface FormProps {
  old: PriceList;
  book: Book;
  onClose: () => void;
  onDone: () => void;
}

function PriceForm({ old, book, onClose, onDone }: FormProps) {
  const [list, setList] = useState(old);
  const [begins, setBegins] = useState("");
  const [currency, setCurrency] = useState(book.currency);
  const [fault, setFault] = useState<unknown>(null);
  const change = (part: Partial<PriceList>) => setList({ ...list, ...part });
  const changeHours = (row: number, part: Partial<Hours>) =>
    change({ windows: list.windows.map((hours, i) => (i === row ? { ...hours, ...part } : hours)) });

  const save = async (event: Event) => {
    event.preventDefault();
    setFault(null);
    const { from: _, ...rest } = list;
    const entry = { ...rest, model: list.model.trim(), ...(begins ? { from: new Date(begins).getTime() / 1000 } : {}) };
    try {
      await put("api/console/prices", { prices: [entry], ...(currency === book.currency ? {} : { currency }) });
      onDone();
    } catch (reason) {
      setFault(reason);
    }
  };
  const fresh = old.model === "";
  return (
    <Dialog title={fresh ? t("setPrice") : t("priceTitle", { model: old.model === OTHERS ? t("everyOther") : old.model })} onClose={onClose}>
      <form class="stack" onSubmit={save}>
        {fresh && (
          <>
            <label class="field">
              <span>{t("model")}</span>
              <input class="input" required list="co-models" placeholder={`* = ${t("everyOther")}`} value={list.model} onInput={(event) => change({ model: event.currentTarget.value })} />
            </label>
            <datalist id="co-models">
              {(models.value ?? []).map((model) => (
                <option key={model.id} value={model.id} />
              ))}
              <option value={OTHERS}>{t("everyOther")}</option>
            </datalist>
          </>
        )}
        {book.prices.length === 0 && (
          <label class="field">
            <span>{t("currency")}</span>
            <input class="input" pattern="[A-Z]{3}" maxLength={3} value={currency} onInput={(event) => setCurrency(event.currentTarget.value.toUpperCase())} />
          </label>
        )}
        <p class="soft small-text">{t("perMillion", { currency })}</p>
        <div class="co-three">
          {KINDS.map((kind) => (
            <label class="field" key={kind}>
              <span>{t(kind)}</span>
              <input
                class="input numbers"
                required
                inputMode="decimal"
                pattern="[0-9]+([.][0-9]+)?"
                value={list[kind]}
                onInput={(event) => change({ [kind]: event.currentTarget.value })}
              />
            </label>
          ))}
        </div>
        <fieldset class="co-hours">
          <legend>{t("peak")}</legend>
          {list.windows.map((hours, row) => (
            <HoursFields key={row} hours={hours} onChange={(part) => changeHours(row, part)} onRemove={() => change({ windows: list.windows.filter((_, i) => i !== row) })} />
          ))}
          <div class="row">
            <button type="button" class="button small" onClick={() => change({ windows: [...list.windows, hoursFrom("09:00", "18:00")] })}>
              {t("addPeak")}
            </button>
            {list.windows.length === 0 && (
              <button type="button" class="button small quiet" onClick={() => change({ windows: [hoursFrom("09:00", "12:00"), hoursFrom("14:00", "18:00")] })}>
                {t("beijing")}
              </button>
            )}
          </div>
        </fieldset>
        <label class="field">
          <span>{t("begins")}</span>
          <input class="input" type="datetime-local" value={begins} onInput={(event) => setBegins(event.currentTarget.value)} />
          <small class="faint">{t("priceKept")}</small>
        </label>
        {fault !== null && <Trouble fault={fault} />}
        <div class="row end">
          <button type="button" class="button" onClick={onClose}>
            {shellWords("cancel")}
          </button>
          <button type="submit" class="button primary">
            {t("save")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

function HoursFields({ hours, onChange, onRemove }: { hours: Hours; onChange: (part: Partial<Hours>) => void; onRemove: () => void }) {
  const toggle = (day: Day) =>
    onChange({ weekdays: DAYS.filter((one) => (one === day) !== hours.weekdays.includes(one)) });
  return (
    <div class="co-window">
      <div class="row">
        <input class="input" required aria-label={t("from")} pattern="([01][0-9]|2[0-3]):[0-5][0-9]" value={hours.start} onInput={(event) => onChange({ start: event.currentTarget.value })} />
        <span>–</span>
        <input class="input" required aria-label={t("until")} pattern="([01][0-9]|2[0-4]):[0-5][0-9]" value={hours.end} onInput={(event) => onChange({ end: event.currentTarget.value })} />
        <span>×</span>
        <input class="input co-factor" required aria-label={t("factor")} title={t("factor")} value={hours.factor} onInput={(event) => onChange({ factor: event.currentTarget.value })} />
        <IconButton icon="close" label={t("removeWindow")} class="co-last" onClick={onRemove} />
      </div>
      <div class="co-days">
        {DAYS.map((day) => (
          <button key={day} type="button" aria-pressed={hours.weekdays.includes(day)} onClick={() => toggle(day)}>
            {t(day)}
          </button>
        ))}
      </div>
      <input class="input mono" required aria-label={t("timezone")} title={t("timezone")} value={hours.timezone} onInput={(event) => onChange({ timezone: event.currentTarget.value })} />
    </div>
  );
}
