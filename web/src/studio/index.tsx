// Studio: the runs on this machine, watched as they learn.

import "./parts.css";
import "./studio.css";
import { Compare } from "./compare";
import { RunList } from "./run_list";
import { RunPage } from "./run_page";

const COMPARE = "compare:";

export function Studio({ run }: { run: string | null }) {
  if (!run) return <RunList />;
  if (run.startsWith(COMPARE)) return <Compare key={run} ids={run.slice(COMPARE.length).split(",").filter(Boolean)} />;
  return <RunPage key={run} id={run} />;
}
