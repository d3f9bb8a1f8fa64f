"use strict";
// Draws the pictures from the JSON in the page. Names are only ever set as text. Goes on in page.charts.js.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SPACE = "http" + "://www.w3.org/2000/svg"; // the name of a language, nothing is fetched
  const PHASES = {
    F: "forward", B: "input gradient", W: "weight gradient", R: "recomputed in backward",
    O: "optimizer and synchronisation",
  };
  const SHORT = {
    F: "forward", B: "input gradient", W: "weight gradient", R: "recomputed", O: "synchronisation",
  };
  const LINK = { intra: "inside the node", inter: "between nodes" };
  const LANES = [["compute", "computation"], ["intra", "link inside the node"], ["inter", "link between nodes"]];
  const LANE = Object.fromEntries(LANES);
  const $ = (id) => document.getElementById(id);

  // --- small things ------------------------------------------------------------------------------------------------

  function svg(tag, attributes = {}, text = "") {
    const node = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== "") node.textContent = text;
    return node;
  }

  function make(tag, className = "", text = "") {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== "") node.textContent = text;
    return node;
  }

  const three = (x) => (Math.abs(x) >= 100 ? Math.round(x).toLocaleString("en") : String(Number(x.toPrecision(3))));

  function scaled(x, steps) {
    for (const [scale, unit] of steps) if (Math.abs(x) >= scale * 0.9995) return three(x / scale) + unit;
    return three(x / steps[steps.length - 1][0]) + steps[steps.length - 1][1];
  }

  const seconds = (x) => (x === 0 ? "0 ms" : scaled(x, [[1, " s"], [1e-3, " ms"], [1e-6, " µs"]]));
  const bytes = (x) => scaled(x, [[1e12, " TB"], [1e9, " GB"], [1e6, " MB"], [1e3, " kB"], [1, " B"]]);
  const many = (x) => scaled(x, [[1e9, " B"], [1e6, " M"], [1e3, " k"], [1, ""]]);

  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1) || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step || 0);
    return found;
  }

  // --- tips: by pointer, by tap ------------------------------------------------------------------------------------

  const tip = $("tip");
  function hideTip() { tip.hidden = true; }
  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(event.clientX + 12, 8), innerWidth - box.width - 8);
    const above = event.clientY - box.height - 14;
    tip.style.left = left + "px";
    tip.style.top = (above > 8 ? above : event.clientY + 18) + "px";
  }
  // `find` gives the text for an event, "" for none.
  function tips(node, find) {
    const show = (event) => { const text = find(event); if (text) showTip(event, text); else hideTip(); };
    node.addEventListener("pointermove", show);
    node.addEventListener("pointerdown", show);
    node.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideTip(); });
  }
  addEventListener("scroll", hideTip, { passive: true });

  function hatch() {
    const holder = svg("svg", { width: 0, height: 0, "aria-hidden": "true" });
    holder.style.position = "absolute";
    const defs = svg("defs");
    for (const [id, back, line, thick] of [["hatch", "waitback", "waitline", 2.2], ["awaited", "comm", "commline", 1.6]]) {
      const pattern = svg("pattern", {
        id, width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)",
      });
      pattern.append(svg("rect", { width: 6, height: 6, class: back }));
      pattern.append(svg("line", { x1: 1.5, y1: 0, x2: 1.5, y2: 6, class: line, "stroke-width": thick }));
      defs.append(pattern);
    }
    holder.append(defs);
    document.body.append(holder);
  }

  function swatch(className, fill = "") {
    const node = svg("svg", { width: 16, height: 12, "aria-hidden": "true" });
    const rect = svg("rect", { width: 16, height: 12, rx: 2, class: className });
    if (fill) rect.setAttribute("fill", fill);
    node.append(rect);
    return node;
  }

  // --- the step ----------------------------------------------------------------------------------------------------

  function rowsOf(list) {
    const columns = list.table.columns;
    return list.table.rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]])));
  }

  function pictures() {
    const found = [["Without overlap", "plain"], [data.timeline.title, "overlapped"]].map(([title, name]) => {
      const list = data.timeline[name];
      return { title, rows: rowsOf(list), end: list.drawn_seconds, totals: list.totals, how: "simulated" };
    });
    const traced = data.timeline.traced || {};
    const own = String(data.timeline.rank);
    const measured = { ...(data.timeline.measured ? { [own]: data.timeline.measured } : {}), ...traced };
    for (const [rank, list] of Object.entries(measured)) {
      if (list.table.rows.length) found.push({
        title: `Measured, rank ${rank}`, rows: rowsOf(list), end: list.drawn_seconds, totals: list.totals,
        how: "last step", other: rank !== own,
      });
    }
    return found;
  }

  const shown = pictures();
  const present = new Set(shown.flatMap((p) => p.rows.map((row) => row.stream)));
  const lanes = LANES.filter(([stream]) => stream === "compute" || present.has(stream));

  function legend() {
    const node = $("legend");
    const used = new Set(shown.flatMap((p) => p.rows.filter((r) => r.stream === "compute").map((r) => r.phase)));
    const add = (icon, text) => { const span = make("span"); span.append(icon, text); node.append(span); };
    for (const phase of Object.keys(PHASES)) if (used.has(phase)) add(swatch(phase), PHASES[phase]);
    if (lanes.length > 1) {
      add(swatch("comm"), "communication, hidden");
      add(swatch("", "url(#awaited)"), "not hidden");
      add(swatch("", "url(#hatch)"), "exposed communication");
    }
  }

  // Rows of one lane, such that bars which overlap in time lie in different ones.
  function stacked(rows) {
    const ends = [];
    return rows.slice().sort((a, b) => a.start - b.start).map((row) => {
      let level = ends.findIndex((end) => end <= row.start + 1e-12);
      if (level < 0) level = ends.length < 5 ? ends.push(0) - 1 : 4;
      ends[level] = row.end;
      return { row, level };
    });
  }

  function about(row) {
    const lines = [row.name, PHASES[row.phase] + (row.stream === "compute" ? "" : ", " + LANE[row.stream])];
    lines.push(`${seconds(row.end - row.start)}, from ${seconds(row.start)} on`);
    if (row.stream !== "compute") {
      lines.push(`${bytes(row.bytes)} sent by this rank`);
      lines.push(row.exposed > 0 ? `waited for during ${seconds(row.exposed)}` : "its reader did not have to wait");
    }
    return lines.join("\n");
  }

  const waitsOf = (rows) => rows.filter((r) => r.exposed > 0).map((r) => [r.end - r.exposed, r.end]);

  // When a message travels while it or another is exposed.
  function bare(row, waits) {
    const parts = waits.map(([from, to]) => [Math.max(from, row.start), Math.min(to, row.end)]);
    return parts.filter(([from, to]) => to > from);
  }

  function lane(picture, stream, width, scale) {
    const travels = stream !== "compute";
    const rows = picture.rows.filter((row) => row.stream === stream);
    const laid = travels ? stacked(rows) : rows.map((row) => ({ row, level: 0 }));
    const levels = Math.max(1, ...laid.map(({ level }) => level + 1));
    const tall = travels ? (levels > 1 ? 9 : 20) : 26;
    const height = levels * tall + (levels - 1);
    const node = svg("svg", { width, height, role: "img", "aria-label": `${picture.title}: ${LANE[stream]}` });
    node.append(svg("rect", { width, height, class: "lanebed", rx: 2 }));
    const texts = [], waits = waitsOf(picture.rows);
    const bar = (start, end, y, attributes, text) => {
      const x = start * scale;
      const wide = Math.max((end - start) * scale - (end - start > 0 ? 0.5 : 0), 0.7);
      node.append(svg("rect", { x, y, width: wide, height: tall, "data-tip": texts.push(text) - 1, ...attributes }));
      return [x, wide];
    };
    for (const { row, level } of laid) {
      const y = level * (tall + 1);
      const [x, wide] = bar(row.start, row.end, y, { class: travels ? "comm" : row.phase }, about(row));
      const name = row.name.startsWith("layers.") ? row.name.split(".").slice(2).join(".") : row.name;
      if (!travels && wide > name.length * 6.1 + 8) {
        const phase = row.phase.toLowerCase();
        node.append(svg("text", { x: x + 4, y: y + tall / 2 + 4, class: "in " + phase }, name));
      }
      for (const [from, to] of travels ? bare(row, waits) : []) {
        if ((to - from) * scale > 0.4) bar(from, to, y, { fill: "url(#awaited)" }, about(row));
      }
    }
    if (!travels) {
      for (const row of picture.rows) {
        if (row.stream === "compute" || row.exposed * scale < 0.4) continue;
        const text = `exposed communication:\n ${seconds(row.exposed)}, waiting for\n${row.name}`;
        bar(row.end - row.exposed, row.end, 0, { fill: "url(#hatch)" }, text);
      }
    }
    tips(node, (event) => texts[Number(event.target.dataset.tip ?? -1)] ?? "");
    return node;
  }

  function axis(width, end, label) {
    const node = svg("svg", { width, height: 20, "aria-hidden": "true" });
    const unit = end >= 2 ? [1, "seconds"] : end >= 2e-3 ? [1e-3, "milliseconds"] : [1e-6, "microseconds"];
    node.append(svg("line", { x1: 0, x2: width, y1: 0.5, y2: 0.5, class: "edge" }));
    for (const at of ticks(0, end / unit[0], width / 90)) {
      const x = (at * unit[0] / end) * width;
      node.append(svg("line", { x1: x, x2: x, y1: 0, y2: 5, class: "edge" }));
      const anchor = x < 12 ? "start" : x > width - 16 ? "end" : "middle";
      node.append(svg("text", { x, y: 17, "text-anchor": anchor }, three(at)));
    }
    return [node, make("div", "stuck", `${unit[1]} ${label}`)];
  }

  let zoom = 1, everyRank = false;
  const others = shown.filter((picture) => picture.other);
  function timeline() {
    const box = $("timeline");
    const now = shown.filter((picture) => everyRank || !picture.other);
    const width = Math.max(box.clientWidth, 200) * zoom;
    const inner = make("div");
    inner.style.width = width + "px";
    inner.style.setProperty("--view", box.clientWidth + "px");
    const simulatedEnd = Math.max(...now.filter((p) => p.how === "simulated").map((p) => p.end));
    const groups = [now.filter((p) => p.how === "simulated"), now.filter((p) => p.how !== "simulated")];
    groups.filter((group) => group.length).forEach((group) => {
      let end = Math.max(...group.map((p) => p.end));
      if (end < simulatedEnd * 1.6 && end > simulatedEnd / 1.6 && groups[1].length) {
        end = Math.max(...now.map((p) => p.end).filter((e) => e < simulatedEnd * 1.6)); // one axis where that reads well
      }
      for (const picture of group) {
        const node = make("div", "picture");
        const title = make("h3", "stuck", picture.title);
        const t = picture.totals;
        const waits = lanes.length > 1 ? `, ${seconds(t.exposed)} of it waiting for communication` : "";
        title.append(make("small", "", `${picture.how}: a step takes ${seconds(t.seconds)}${waits}`));
        node.append(title);
        for (const [stream, name] of lanes) {
          const row = make("div", "lane");
          row.append(make("div", "stuck", name), lane(picture, stream, width, width / end));
          node.append(row);
        }
        inner.append(node);
      }
      const last = make("div", "picture lane");
      last.style.marginTop = "5px";
      last.append(...axis(width, end, "from the start"));
      inner.append(last);
    });
    box.replaceChildren(inner);
    $("zoom").textContent = zoom + "×";
  }

  function zoomBy(factor) {
    const box = $("timeline");
    const middle = (box.scrollLeft + box.clientWidth / 2) / (box.clientWidth * zoom);
    zoom = Math.min(Math.max(zoom * factor, 1), 64);
    timeline();
    box.scrollLeft = middle * box.clientWidth * zoom - box.clientWidth / 2;
  }

  // --- communication by kind ---------------------------------------------------------------------------------------

  const keyOf = (kind) => `${kind.name} ${kind.phase} ${kind.stream}`;
  function ranks() {
    const button = $("ranks");
    button.hidden = !others.length;
    button.textContent = `all ${others.length + 1} traced ranks`;
    button.addEventListener("click", () => {
      everyRank = !everyRank;
      button.setAttribute("aria-pressed", String(everyRank));
      timeline();
    });
  }

  const hiddenOf = (kind) => Math.max(kind.seconds - kind.exposed, 0);

  function kindBar(kind, width, scale, tall, text) {
    const node = svg("svg", { width, height: tall });
    const a = hiddenOf(kind) * scale, b = kind.exposed * scale;
    node.append(svg("rect", { width: Math.max(a, a > 0 ? 0.7 : 0), height: tall, class: "comm" }));
    node.append(svg("rect", { x: a, width: b, height: tall, fill: "url(#hatch)" }));
    tips(node, () => `${text}\nhidden ${seconds(hiddenOf(kind))}\nnot hidden ${seconds(kind.exposed)}`);
    return node;
  }

  const messages = (count) => `${count.toLocaleString("en")} message${count === 1 ? "" : "s"}`;
  const FEW = 12; // kinds that are shown at first
  let everyKind = false;

  function kinds() {
    const box = $("bars");
    const before = new Map(data.timeline.plain.kinds.map((kind) => [keyOf(kind), kind]));
    const list = data.kinds.slice().sort((a, b) => b.seconds - a.seconds);
    const long = Math.max(1e-12, ...[...list, ...before.values()].map((k) => hiddenOf(k) + k.exposed));
    const head = make("div", "kind head");
    head.append(make("span", "", "operator"), make("span", "", "upper bar without, lower bar with overlap"),
      make("span", "num", "hidden"), make("span", "num", "not hidden"));
    box.replaceChildren(head);
    for (const kind of everyKind ? list : list.slice(0, FEW)) {
      const row = make("div", "kind");
      const name = make("div");
      name.append(make("b", "", kind.name));
      name.append(make("small", "", `${SHORT[kind.phase]} · ${LINK[kind.stream]} · ${messages(kind.count)}, ${bytes(kind.bytes)}`));
      const bars = make("div");
      const hidden = make("div", "num"), waited = make("div", "num");
      hidden.append(make("i", "", "hidden "), seconds(hiddenOf(kind)));
      waited.append(make("i", "", "not hidden "), seconds(kind.exposed));
      row.append(name, bars, hidden, waited);
      box.append(row);
      const width = bars.clientWidth;
      const plain = before.get(keyOf(kind));
      if (plain) bars.append(kindBar(plain, width, width / long, 6, kind.name + " without overlap"));
      const ours = kindBar(kind, width, width / long, 11, kind.name + " with overlap");
      ours.style.marginTop = "2px";
      bars.append(ours);
    }
    if (list.length > FEW) {
      const button = make("button", "wide", everyKind ? `only the ${FEW} longest` : `all ${list.length} kinds`);
      button.type = "button";
      button.addEventListener("click", () => { everyKind = !everyKind; kinds(); });
      box.append(button);
    }
  }
