{{/*
Models and adapters: where each source puts them. An item is .Values.model or an element of .Values.adapters.

  source        from                    into
  demo          init container          /var/cache/alora-serve/demo/{model,adapters}
  hub, s3       init container          /var/cache/alora-serve/{models,adapters}/NAME
  pvc, image    volume, read-only       /srv/alora-serve/{models,adapters}/NAME
*/}}

{{/* (dict "folder" "models" "item" .Values.model) */}}
{{- define "alora-serve.sourcePath" -}}
{{- if eq .item.source "demo" -}}
/var/cache/alora-serve/demo/{{ eq .folder "models" | ternary "model" "adapters" }}
{{- else if has .item.source (list "hub" "s3") -}}
/var/cache/alora-serve/{{ .folder }}/{{ .item.name }}
{{- else -}}
/srv/alora-serve/{{ .folder }}/{{ .item.name }}
{{- end -}}
{{- end }}

{{- define "alora-serve.adapterRoots" -}}
{{- $roots := list -}}
{{- $items := eq .Values.model.source "demo" | ternary (list .Values.model) list -}}
{{- range concat $items .Values.adapters -}}
{{- $roots = append $roots (include "alora-serve.sourcePath" (dict "folder" "adapters" "item" .)) -}}
{{- end -}}
{{- join "," $roots -}}
{{- end }}

{{/* What a component reads, as JSON: {"sources": [{"folder": ..., "item": ...}]}. Only workers need adapters. */}}
{{- define "alora-serve.sources" -}}
{{- $sources := list -}}
{{- if include "alora-serve.isModelService" . -}}
{{- $sources = append $sources (dict "folder" "models" "item" .ctx.Values.model) -}}
{{- if eq .component "adapter-decode" -}}
{{- range .ctx.Values.adapters }}{{ $sources = append $sources (dict "folder" "adapters" "item" .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- dict "sources" $sources | toJson -}}
{{- end }}

{{- define "alora-serve.sourceVolumes" -}}
{{- $ctx := .ctx -}}
{{- range (include "alora-serve.sources" . | fromJson).sources }}
{{- if eq .item.source "pvc" }}
- name: {{ .folder }}-{{ .item.name | lower | replace "." "-" }}
  persistentVolumeClaim:
    claimName: {{ required (printf "source pvc of %s needs pvc.claimName" .item.name) .item.pvc.claimName }}
    readOnly: true
{{- else if eq .item.source "image" }}
{{- if semverCompare "<1.31.0-0" $ctx.Capabilities.KubeVersion.Version }}
{{- fail (printf "source image of %s needs Kubernetes 1.31 or newer: use pvc, hub or s3" .item.name) }}
{{- else if and .item.image.subPath (semverCompare "<1.33.0-0" $ctx.Capabilities.KubeVersion.Version) }}
{{- fail (printf "image.subPath of %s needs Kubernetes 1.33 or newer: give it an image of its own" .item.name) }}
{{- end }}
- name: {{ .folder }}-{{ .item.name | lower | replace "." "-" }}
  image:
    {{- $reference := required (printf "source image of %s needs image.reference" .item.name) .item.image.reference }}
    reference: {{ include "alora-serve.volumeReference" (dict "ctx" $ctx "reference" $reference) }}
    pullPolicy: {{ .item.image.pullPolicy | default "IfNotPresent" }}
{{- end }}
{{- end }}
{{- end }}

{{/* As given, but from the one registry there is; a host is what has a dot or a port, as Docker reads it. */}}
{{- define "alora-serve.volumeReference" -}}
{{- with .ctx.Values.global.imageRegistry -}}
{{- trimSuffix "/" . }}/{{ regexReplaceAll "^(localhost|[^/]*[.:][^/]*)/" $.reference "" -}}
{{- else -}}
{{- .reference -}}
{{- end -}}
{{- end }}

{{- define "alora-serve.sourceMounts" -}}
{{- range (include "alora-serve.sources" . | fromJson).sources }}
{{- if has .item.source (list "pvc" "image") }}
- name: {{ .folder }}-{{ .item.name | lower | replace "." "-" }}
  mountPath: {{ include "alora-serve.sourcePath" . }}
  readOnly: true
  {{- with (index .item .item.source).subPath }}
  subPath: {{ . }}
  {{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "alora-serve.sourceInitContainers" -}}
{{- $component := . -}}
{{- range (include "alora-serve.sources" . | fromJson).sources }}
{{- if has .item.source (list "demo" "hub" "s3") }}
- name: {{ .folder }}-{{ .item.name | lower | replace "." "-" }}
  {{- $arguments := dict "ctx" $component.ctx "item" .item "path" (include "alora-serve.sourcePath" .) }}
  {{- include (printf "alora-serve.%sInit" .item.source) $arguments | nindent 2 }}
  resources:
    {{- toYaml $component.values.resources | nindent 4 }}
  securityContext:
    {{- include "alora-serve.containerSecurity" $component.ctx | nindent 4 }}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: cache, mountPath: /var/cache/alora-serve}
{{- end }}
{{- end }}
{{- end }}

{{/* The image's own command copies the model and the adapters. */}}
{{- define "alora-serve.demoInit" -}}
image: {{ include "alora-serve.image" (dict "ctx" .ctx "image" .ctx.Values.demoImage) }}
imagePullPolicy: {{ .ctx.Values.demoImage.pullPolicy }}
args: [/var/cache/alora-serve/demo]
{{- end }}

{{/* The prefill image, which every cluster has anyway, brings the hub's client. */}}
{{- define "alora-serve.hubInit" -}}
{{- $hub := .item.hub -}}
image: {{ include "alora-serve.image" (dict "ctx" .ctx "image" .ctx.Values.basePrefill.image) }}
imagePullPolicy: {{ .ctx.Values.basePrefill.image.pullPolicy }}
command:
  - python
  - -m
  - alora_serve.model.hub_copy
  - {{ required (printf "source hub of %s needs hub.repo" .item.name) $hub.repo }}
  - --revision={{ $hub.revision | default "main" }}
  - --root={{ .path }}
  {{- with $hub.folder }}
  - --folder={{ . }}
  {{- end }}
  {{- range $hub.include | default (list "*.json" "*.safetensors" "*.yaml") }}
  - --include={{ . }}
  {{- end }}
env:
  - {name: HF_HUB_OFFLINE, value: "0"}
  - {name: HF_HUB_DISABLE_UPDATE_CHECK, value: "1"}
  - {name: HF_HOME, value: /tmp/huggingface}
  {{- with $hub.endpoint }}
  - {name: HF_ENDPOINT, value: {{ . | quote }}}
  {{- end }}
  {{- with $hub.tokenSecret }}
  {{- if .name }}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ .name }}, key: {{ .key | default "token" }}}}
  {{- end }}
  {{- end }}
{{- end }}

{{- define "alora-serve.s3Init" -}}
{{- $s3 := .item.s3 -}}
image: {{ include "alora-serve.image" (dict "ctx" .ctx "image" .ctx.Values.s3Image) }}
imagePullPolicy: {{ .ctx.Values.s3Image.pullPolicy }}
args:
  - sync
  {{- $bucket := required (printf "source s3 of %s needs s3.bucket" .item.name) $s3.bucket }}
  - {{ printf ":s3:%s/%s" $bucket ($s3.prefix | default "") | trimSuffix "/" | quote }}
  - {{ .path }}
  - --config= # none: variables say it all
env:
  - {name: RCLONE_S3_PROVIDER, value: {{ $s3.provider | default "AWS" }}}
  - {name: RCLONE_S3_REGION, value: {{ $s3.region | default "us-east-1" }}}
  {{- with $s3.endpoint }}
  - {name: RCLONE_S3_ENDPOINT, value: {{ . | quote }}}
  {{- end }}
  {{- with $s3.credentialsSecret }}
  - name: RCLONE_S3_ACCESS_KEY_ID
    valueFrom: {secretKeyRef: {name: {{ . }}, key: access-key-id}}
  - name: RCLONE_S3_SECRET_ACCESS_KEY
    valueFrom: {secretKeyRef: {name: {{ . }}, key: secret-access-key}}
  {{- else }}
  - {name: RCLONE_S3_ENV_AUTH, value: "true"}
  {{- end }}
{{- end }}
