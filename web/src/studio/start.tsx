// Starting a run: a recipe, what is to be different in it, and a name.

import { useEffect, useState } from "preact/hooks";
import { studioWords as t } from "../i18n/studio";
import { shellWords } from "../i18n/shell";
import { get, post } from "../shell/api";
import { go } from "../shell/router";
import { Dialog, IconButton, Spinner, tell, Trouble } from "../shell/ui";

interface Recipe {
  name: string;
  description: string;
  minutes: number | null;
}

/** What is changed most often, as a help for typing. */
const KEYS = [
  "stages.0.minutes",
  "stages.0.steps",
  "stages.0.batch_size",
  "stages.0.sequence_length",
  "stages.0.optimizer.learning_rate",
  "stages.0.validation_steps",
  "model.hidden_size",
  "model.num_hidden_layers",
  "model.n_routed_experts",
  "tokenizer.vocab_size",
  "seed",
];

export function StartRun({ onClose }: { onClose: () => void }) {
  const [recipes, setRecipes] = useState<Recipe[] | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  const [chosen, setChosen] = useState("");
  const [name, setName] = useState("");
  const [changes, setChanges] = useState<[string, string][]>([]);
  const [busy, setBusy] = useState(false);
  useEffect(() => {
    get<Recipe[]>("api/recipes").then((found) => {
      setRecipes(found);
      setChosen((found.find((recipe) => recipe.name === "quickstart") ?? found[0])?.name ?? "");
    }, setFault);
  }, []);

  const start = async (event: Event) => {
    event.preventDefault();
    setBusy(true);
    setFault(null);
    const set = Object.fromEntries(changes.filter(([key]) => key.trim()).map(([key, value]) => [key.trim(), read(value)]));
    try {
      const run = await post<{ id: string }>("api/runs", { recipe: chosen, set, ...(name.trim() ? { name: name.trim() } : {}) });
      tell(t("startedRun", { name: run.id }));
      onClose();
      go("studio", run.id);
    } catch (reason) {
      setFault(reason);
      setBusy(false);
    }
  };
  const change = (row: number, at: 0 | 1, text: string) =>
    setChanges(changes.map((pair, i) => (i === row ? ((at ? [pair[0], text] : [text, pair[1]]) as [string, string]) : pair)));

  return (
    <Dialog title={t("startTitle")} onClose={onClose}>
      <form class="stack st-start" onSubmit={start}>
        <p class="soft small-text">{t("startHint")}</p>
        {recipes === null && fault === null && <Spinner />}
        <fieldset class="st-recipes">
          <legend>{t("recipe")}</legend>
          {recipes?.map((recipe) => (
            <label key={recipe.name} class={recipe.name === chosen ? "is-chosen" : ""}>
              <input type="radio" name="recipe" value={recipe.name} checked={recipe.name === chosen} onChange={() => setChosen(recipe.name)} />
              <span>
                <b>{recipe.name}</b>
                {recipe.minutes != null && <small class="faint"> {t("minutes", { n: recipe.minutes })}</small>}
                <small class="soft">{recipe.description}</small>
              </span>
            </label>
          ))}
        </fieldset>
        <label class="field">
          <span>{t("runName")}</span>
          <input
            class="input"
            value={name}
            maxLength={80}
            pattern="[A-Za-z0-9][A-Za-z0-9._\-]*"
            title={t("runNameHint")}
            placeholder={chosen}
            autocomplete="off"
            onInput={(event) => setName(event.currentTarget.value)}
          />
        </label>
        <fieldset class="st-changes">
          <legend title={t("changesHint")}>{t("changes")}</legend>
          {changes.map(([key, value], row) => (
            <div class="st-change" key={row}>
              <input
                class="input mono"
                list="st-keys"
                aria-label={t("changeKey")}
                placeholder={t("changeKey")}
                autocomplete="off"
                spellcheck={false}
                value={key}
                onInput={(event) => change(row, 0, event.currentTarget.value)}
              />
              <input
                class="input mono"
                aria-label={t("changeValue")}
                placeholder={t("changeValue")}
                autocomplete="off"
                spellcheck={false}
                value={value}
                onInput={(event) => change(row, 1, event.currentTarget.value)}
              />
              <IconButton icon="close" label={t("removeChange")} onClick={() => setChanges(changes.filter((_, i) => i !== row))} />
            </div>
          ))}
          <datalist id="st-keys">
            {KEYS.map((key) => (
              <option key={key} value={key} />
            ))}
          </datalist>
          <button type="button" class="button small" onClick={() => setChanges([...changes, ["", ""]])}>
            {t("addChange")}
          </button>
        </fieldset>
        {fault !== null && <Trouble fault={fault} />}
        <div class="row end">
          <button type="button" class="button" onClick={onClose}>
            {shellWords("cancel")}
          </button>
          <button type="submit" class="button primary" disabled={!chosen || busy}>
            {t("start")}
          </button>
        </div>
      </form>
    </Dialog>
  );
}

/** 3 is a number, true a truth, [1, 2] a list; what is none of these is text. */
function read(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}
