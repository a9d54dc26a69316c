// Several runs over each other: the same curves, one colour for each run.

import { useEffect, useMemo } from "preact/hooks";
import { studioWords as t } from "../i18n/studio";
import { Icon } from "../shell/icons";
import { address } from "../shell/router";
import { Spinner, Trouble } from "../shell/ui";
import { Curves } from "./curves";
import { flatten } from "./facts";
import { LiveRun } from "./live";
import { StateBadge } from "./run_list";

export function Compare({ ids }: { ids: string[] }) {
  const lives = useMemo(() => ids.map((id) => new LiveRun(id)), [ids.join(",")]);
  useEffect(() => {
    for (const live of lives) void live.begin();
    return () => lives.forEach((live) => live.end());
  }, [lives]);

  const version = lives.reduce((sum, live) => sum + live.version.value, 0);
  const loaded = lives.filter((live) => live.loaded.value);
  const faults = lives.filter((live) => live.fault.value !== null && !live.loaded.value);
  const runs = loaded.map((live) => ({ name: live.id, records: live.records }));
  return (
    <div class="page st-page">
      <a class="st-back" href={address("studio")}>
        <Icon name="left" size={16} />
        {t("back")}
      </a>
      <header class="st-head">
        <h1>{t("compareTitle", { n: lives.length })}</h1>
      </header>
      <ul class="st-compared">
        {lives.map((live, i) => (
          <li key={live.id}>
            <i class="st-dash" style={{ background: `var(--st-line-${i % 8})` }} />
            <a href={address("studio", live.id)}>{live.id}</a>
            {live.run.value && <StateBadge state={live.run.value.state} />}
          </li>
        ))}
      </ul>
      {faults.map((live) => (
        <Trouble key={live.id} fault={live.fault.value} />
      ))}
      {loaded.length + faults.length < lives.length ? (
        <div class="middle">
          <Spinner />
        </div>
      ) : (
        runs.length > 0 && (
          <>
            {/* Lines take their colours by place, so all runs stand here, loaded or not. */}
            <Curves runs={lives.map((live) => ({ name: live.id, records: live.records }))} version={version} together={ids.join(",")} />
            <Differences lives={loaded} />
          </>
        )
      )}
    </div>
  );
}

/** The keys in which the recipes are not the same. */
function Differences({ lives }: { lives: LiveRun[] }) {
  const recipes = lives.map((live) => new Map(flatten(live.run.value?.recipe ?? {})));
  const keys = [...new Set(recipes.flatMap((recipe) => [...recipe.keys()]))];
  const different = keys.filter((key) => new Set(recipes.map((recipe) => recipe.get(key))).size > 1);
  return (
    <section class="st-group">
      <h2>{t("differences")}</h2>
      {different.length === 0 ? (
        <p class="soft">{t("noDifferences")}</p>
      ) : (
        <div class="st-wide">
          <table class="table">
            <thead>
              <tr>
                <th scope="col">{t("changeKey")}</th>
                {lives.map((live) => (
                  <th scope="col" key={live.id}>
                    {live.id}
                  </th>
                ))}
              </tr>
            </thead>
            <tbody>
              {different.map((key) => (
                <tr key={key}>
                  <th scope="row" class="mono">
                    {key}
                  </th>
                  {recipes.map((recipe, i) => (
                    <td key={i} class="mono">
                      {recipe.get(key) ?? "–"}
                    </td>
                  ))}
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  );
}
