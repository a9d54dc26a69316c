import { useEffect, useRef, useState } from "preact/hooks";
import { Dialog } from "../shell/ui";
import type { Thread } from "./thread";
import { DEFAULTS, type Settings } from "./types";
import { chatWords as t } from "./words";

interface NumberProps {
  label: string;
  hint: string;
  value: number | null;
  min: number;
  max?: number;
  step: number;
  onChange: (value: number | null) => void;
}

/** Empty: the server decides. */
function NumberField({ label, hint, value, min, max, step, onChange }: NumberProps) {
  return (
    <label class="field">
      <span>{label}</span>
      <input
        class="input numbers"
        type="number"
        inputMode="decimal"
        placeholder={t("byServer")}
        min={min}
        max={max}
        step={step}
        value={value ?? ""}
        onInput={(event) => {
          const input = event.currentTarget;
          if (input.value === "") onChange(input.validity.badInput ? value : null);
          else if (input.validity.valid) onChange(Number(input.value));
        }}
      />
      <span class="faint small-text">{hint}</span>
    </label>
  );
}

export function SettingsDrawer({ thread, onClose }: { thread: Thread; onClose: () => void }) {
  const [system, setSystem] = useState(thread.system.value);
  const [settings, setSettings] = useState<Settings>(thread.settings.value);
  const model = thread.model.value;
  const latest = useRef({ system, settings });
  latest.current = { system, settings };
  // Kept when the drawer closes, whichever way it does.
  useEffect(
    () => () => {
      const { system, settings } = latest.current;
      const part = {
        ...(system !== thread.system.value ? { system } : {}),
        ...(settings !== thread.settings.value ? { settings } : {}),
      };
      if (Object.keys(part).length) void thread.set(part);
    },
    [],
  );
  const set = (part: Partial<Settings>) => setSettings({ ...settings, ...part });
  const wrong = toolsFault(settings.tools);
  return (
    <Dialog title={t("settings")} kind="side" onClose={onClose}>
      <div class="stack settings">
        {model?.kind !== "text" && (
          <label class="field">
            <span>{t("system")}</span>
            <textarea class="input" rows={5} value={system} onInput={(event) => setSystem(event.currentTarget.value)} />
            <span class="faint small-text">{t("systemHint")}</span>
          </label>
        )}
        {model?.thinks && (
          <>
            <label class="row check">
              <input
                type="checkbox"
                checked={settings.thinking}
                onChange={(event) => set({ thinking: event.currentTarget.checked })}
              />
              {t("thinkingOn")}
            </label>
            <NumberField
              label={t("budget")}
              hint={t("budgetHint")}
              value={settings.thinking_budget}
              min={0}
              step={1}
              onChange={(thinking_budget) => set({ thinking_budget })}
            />
          </>
        )}
        <NumberField
          label={t("temperature")}
          hint={t("temperatureHint")}
          value={settings.temperature}
          min={0}
          max={2}
          step={0.05}
          onChange={(temperature) => set({ temperature })}
        />
        <NumberField
          label={t("topP")}
          hint={t("topPHint")}
          value={settings.top_p}
          min={0.01}
          max={1}
          step={0.01}
          onChange={(top_p) => set({ top_p })}
        />
        <NumberField
          label={t("maxTokens")}
          hint={t("maxTokensHint")}
          value={settings.max_tokens}
          min={1}
          step={1}
          onChange={(max_tokens) => set({ max_tokens })}
        />
        <NumberField
          label={t("seed")}
          hint={t("seedHint")}
          value={settings.seed}
          min={0}
          max={Number.MAX_SAFE_INTEGER}
          step={1}
          onChange={(seed) => set({ seed })}
        />
        {model?.tools && (
          <label class="field">
            <span>{t("tools")}</span>
            <textarea
              class="input mono"
              rows={4}
              spellcheck={false}
              value={settings.tools}
              onInput={(event) => set({ tools: event.currentTarget.value })}
            />
            <span class={wrong ? "bad small-text" : "faint small-text"}>
              {wrong ? t("toolsBad", { why: wrong }) : t("toolsHint")}
            </span>
          </label>
        )}
        <div class="row end">
          <button
            type="button"
            class="button"
            onClick={() => {
              setSettings({ ...DEFAULTS });
              setSystem("");
            }}
          >
            {t("reset")}
          </button>
        </div>
      </div>
    </Dialog>
  );
}

function toolsFault(text: string): string {
  if (!text.trim()) return "";
  try {
    return Array.isArray(JSON.parse(text)) ? "" : text.trim().slice(0, 20);
  } catch (fault) {
    return (fault as Error).message;
  }
}
