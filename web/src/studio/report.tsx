// The report of a finished run. It is fetched here, as a frame could not send the key, and shown in
// a frame that may do nothing: no scripts, no forms, no way out.

import { useEffect, useState } from "preact/hooks";
import { studioWords as t } from "../i18n/studio";
import { download, send } from "../shell/api";
import { Icon } from "../shell/icons";
import { Spinner, tellFault, Trouble } from "../shell/ui";

export function Report({ id, name }: { id: string; name: string }) {
  const path = `api/runs/${encodeURIComponent(id)}/report`;
  const [page, setPage] = useState<string | null>(null);
  const [fault, setFault] = useState<unknown>(null);
  useEffect(() => {
    const over = new AbortController();
    send(path, { signal: over.signal })
      .then((answer) => answer.text())
      .then(setPage, (reason) => over.signal.aborted || setFault(reason));
    return () => over.abort();
  }, [path]);
  if (fault !== null) return <Trouble fault={fault} />;
  if (page === null) return <Spinner />;
  return (
    <div class="st-report">
      <div class="row end">
        <button type="button" class="button small" onClick={() => download(path, `${id}.html`).catch(tellFault)}>
          <Icon name="download" size={15} />
          {t("downloadReport")}
        </button>
      </div>
      <iframe title={t("reportTitle", { name })} sandbox="" srcdoc={page} />
    </div>
  );
}
