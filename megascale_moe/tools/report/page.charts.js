
  // --- charts ------------------------------------------------------------------------------------------------------

  const LEFT = 54, BOTTOM = 34, TOP = 8, RIGHT = 10;

  function frame(box, height, x, y, format, label) {
    const width = Math.max(box.clientWidth, 200);
    const node = svg("svg", { width, height, role: "img", "aria-label": label });
    const px = (v) => LEFT + ((v - x[0]) / (x[1] - x[0] || 1)) * (width - LEFT - RIGHT);
    const py = (v) => height - BOTTOM - ((v - y[0]) / (y[1] - y[0] || 1)) * (height - BOTTOM - TOP);
    for (const at of ticks(y[0], y[1], 4)) {
      node.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: py(at), y2: py(at), class: "grid" }));
      node.append(svg("text", { x: LEFT - 7, y: py(at) + 4, "text-anchor": "end" }, format(at)));
    }
    node.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM, class: "edge" }));
    for (const at of ticks(x[0], x[1], width / 90)) {
      if (!Number.isInteger(at)) continue;
      node.append(svg("text", { x: px(at), y: height - BOTTOM + 15, "text-anchor": "middle" }, at.toLocaleString("en")));
    }
    node.append(svg("text", { x: width - RIGHT, y: height - 3, "text-anchor": "end" }, label));
    box.replaceChildren(node);
    return { node, px, py, width, height };
  }

  function pathOf(points, px, py) {
    let pen = false;
    return points.map(([a, b]) => {
      if (b === null) { pen = false; return ""; }
      const word = `${pen ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`;
      pen = true;
      return word;
    }).join("");
  }

  function curve(id, name, format, unit, { height = 190, zero = false, extra = [], rule = 0 } = {}) {
    const steps = data.metrics.step, values = data.metrics[name];
    const known = [...values.filter((v) => v !== null), ...extra.map((p) => p[1]), ...(rule ? [rule] : [])];
    if (!known.length) { $(id).textContent = "no finite value"; return; }
    let low = zero ? 0 : Math.min(...known), high = Math.max(...known);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    high += room;
    if (!zero) low = Math.max(low - room, low >= 0 ? 0 : -Infinity);
    const x = [Math.min(steps[0], steps.length > 1 ? steps[0] : 0), steps[steps.length - 1]];
    const { node, px, py, width } = frame($(id), height, x, [low, high], format, "step");
    if (rule) node.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: py(rule), y2: py(rule), class: "clip" }));
    const points = steps.map((step, i) => [step, values[i]]);
    node.append(svg("path", { d: pathOf(points, px, py), class: "line" }));
    if (points.length === 1 && values[0] !== null) node.append(svg("circle", { cx: px(steps[0]), cy: py(values[0]), r: 3, class: "F" }));
    if (extra.length) {
      node.append(svg("path", { d: pathOf(extra, px, py), class: "evalline" }));
      for (const [a, b] of extra) node.append(svg("circle", { cx: px(a), cy: py(b), r: 4.5, class: "dot" }));
    }
    const mark = svg("line", { y1: TOP, y2: height - BOTTOM, class: "clip", visibility: "hidden" });
    node.append(mark);
    node.prepend(svg("rect", { width, height, fill: "transparent" }));
    tips(node, (event) => {
      const at = event.clientX - node.getBoundingClientRect().left;
      let best = 0;
      steps.forEach((step, i) => { if (Math.abs(px(step) - at) < Math.abs(px(steps[best]) - at)) best = i; });
      for (const end of ["x1", "x2"]) mark.setAttribute(end, px(steps[best]));
      mark.setAttribute("visibility", "visible");
      const held = extra.find(([step]) => step === steps[best]);
      const value = values[best] === null ? "not finite" : `${format(values[best])} ${unit}`;
      return `step ${steps[best].toLocaleString("en")}\n${value}${held ? `\nevaluation ${format(held[1])} ${unit}` : ""}`;
    });
    node.addEventListener("pointerleave", () => mark.setAttribute("visibility", "hidden"));
  }

  function lossLegend() {
    const caption = $("loss").previousElementSibling;
    if (caption.querySelector("svg")) return;
    const line = svg("svg", { width: 22, height: 10 });
    line.append(svg("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: "line" }));
    const dot = svg("svg", { width: 12, height: 12 });
    dot.append(svg("circle", { cx: 6, cy: 6, r: 4.5, class: "dot" }));
    const node = make("span", "legend");
    const add = (icon, text) => { const span = make("span"); span.append(icon, text); node.append(span); };
    add(line, "training");
    if (data.metrics.eval_loss.length) add(dot, "evaluation");
    node.style.display = "inline-flex";
    node.style.marginLeft = "14px";
    node.style.fontWeight = 400;
    caption.append(node);
  }

  function training() {
    const fixed = (v) => String(Number(v.toPrecision(4)));
    lossLegend();
    curve("loss", "loss", fixed, "nats per token", { height: 240, extra: data.metrics.eval_loss });
    curve("speed", "tokens_per_s", many, "tokens/s", { zero: true });
    curve("norm", "grad_norm", fixed, "", { zero: true, rule: data.clip });
  }

  function load() {
    const box = $("load");
    const { step, layers } = data.load;
    const known = layers.flat().filter((v) => v !== null);
    const high = Math.max(1.01, ...known);
    const width = Math.max(box.clientWidth, 200), left = 64;
    const tall = Math.max(5, Math.min(26, 360 / layers.length));
    const height = layers.length * tall;
    const node = svg("svg", { width, height: height + 36, role: "img", "aria-label": "load of the busiest expert" });
    const wide = (width - left - RIGHT) / step.length;
    const texts = [];
    layers.forEach((values, layer) => {
      const every = Math.ceil(13 / tall);
      if (layer % every === 0) {
        const y = layer * tall + tall / 2 + 4;
        node.append(svg("text", { x: left - 7, y, "text-anchor": "end" }, layer === 0 ? "MoE 0" : String(layer)));
      }
      values.forEach((value, column) => {
        if (value === null) return;
        const share = Math.round((100 * (value - 1)) / (high - 1));
        const rect = svg("rect", { x: left + column * wide, y: layer * tall, width: wide + 0.3, height: tall - (tall > 9 ? 1 : 0) });
        rect.style.fill = `color-mix(in oklab, var(--heat1) ${share}%, var(--heat0))`;
        const [first, last] = step[column];
        rect.dataset.tip = texts.push(`MoE layer ${layer}, step ${first === last ? first : `${first} to ${last}`}\nbusiest expert ${value.toFixed(2)} × the mean`) - 1;
        node.append(rect);
      });
    });
    for (const at of ticks(step[0][0], step[step.length - 1][1], width / 90)) {
      const column = step.findIndex(([, last]) => last >= at);
      if (!Number.isInteger(at) || column < 0) continue;
      node.append(svg("text", { x: left + (column + 0.5) * wide, y: height + 15, "text-anchor": "middle" }, at.toLocaleString("en")));
    }
    node.append(svg("text", { x: width - RIGHT, y: height + 31, "text-anchor": "end" }, "step"));
    const bar = 90;
    for (let i = 0; i < 30; i++) {
      const rect = svg("rect", { x: left + 36 + (i * bar) / 30, y: height + 22, width: bar / 30 + 0.4, height: 10 });
      rect.style.fill = `color-mix(in oklab, var(--heat1) ${Math.round((i * 100) / 29)}%, var(--heat0))`;
      node.append(rect);
    }
    node.append(svg("text", { x: left + 31, y: height + 31, "text-anchor": "end" }, "1 ×"));
    node.append(svg("text", { x: left + 41 + bar, y: height + 31 }, `${high.toFixed(2)} × mean`));
    tips(node, (event) => texts[Number(event.target.dataset.tip ?? -1)] ?? "");
    box.replaceChildren(node);
  }

  // --- memory ------------------------------------------------------------------------------------------------------

  function alive() {
    const { alive: values, phases, operators, peak } = data.memory;
    const each = operators / values.length;
    const { node, px, py, width, height } = frame($("alive"), 240, [0, operators], [0, peak * 1.06 || 1], bytes, "operators done");
    values.forEach((value, i) => {
      const x = px(i * each);
      node.append(svg("rect", { x, y: py(value), width: Math.max(px((i + 1) * each) - x + 0.3, 0.5), height: Math.max(py(0) - py(value), 0), class: phases[i] }));
    });
    node.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: py(peak), y2: py(peak), class: "clip" }));
    node.prepend(svg("rect", { width, height, fill: "transparent" }));
    tips(node, (event) => {
      const at = event.clientX - node.getBoundingClientRect().left;
      const i = Math.floor(((at - LEFT) / (width - LEFT - RIGHT)) * values.length);
      return i < 0 || i >= values.length ? "" : `${bytes(values[i])} alive\nafter operator ${Math.round((i + 1) * each).toLocaleString("en")}: ${PHASES[phases[i]]}`;
    });
  }

  function kept() {
    const box = $("kept");
    const most = Math.max(1, ...Object.values(data.memory.kept));
    box.className = "kept";
    box.replaceChildren();
    for (const [name, value] of Object.entries(data.memory.kept)) {
      const ours = name === data.remat;
      box.append(make("span", ours ? "ours" : "", name));
      const cell = make("div");
      box.append(cell);
      const width = Math.max(cell.clientWidth, 120);
      const node = svg("svg", { width, height: 26 });
      const wide = Math.max((value / most) * (width - 130), 1);
      node.append(svg("rect", { y: 3, width: wide, height: 20, rx: 2, class: ours ? "F" : "O" }));
      node.append(svg("text", { x: wide + 7, y: 17 }, bytes(value) + (ours ? ", this one" : "")));
      cell.append(node);
    }
    const stays = $("stays");
    stays.replaceChildren("Besides, all the time: ");
    [["weights", "parameters"], ["gradients", "gradients"], ["optimizer state", "optimizer"]].forEach(([word, name], i) => {
      stays.append(i ? ", " : "", word + " ", make("b", "", bytes(data.memory[name])));
    });
    stays.append(".");
  }

  // --- all ---------------------------------------------------------------------------------------------------------

  function draw() {
    timeline();
    if (data.kinds.length) kinds();
    if (data.memory.alive) { alive(); kept(); }
    if (data.metrics.step) training();
    if (data.load.step) load();
  }

  hatch();
  legend();
  ranks();
  draw();
  $("in").addEventListener("click", () => zoomBy(2));
  $("out").addEventListener("click", () => zoomBy(0.5));
  let before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; draw(); } });
})();
